"""Configs, batches and expected sizes of the steps that are recorded as CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.train.step import TrainStep


def config(
    dtype: str = "float32",
    truncate: str = "batch_min",
    reg_coeff: float = 0.0,
    clip_grad: float | None = None,
    loss: dict | None = None,
    loss_reg_std_mult: float | None = None,
    **model,
) -> Config:
    return Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 48,
                "depth": 2,
                "num_heads": 2,
                "pred_embed_dim": 32,
                "pred_depth": 1,
                "pred_num_heads": 2,
                "zero_init_mask_tokens": False,
                **model,
            },
            "mask": {"truncate": truncate},
            "loss": {"reg_coeff": reg_coeff, **(loss or {})},
            "data": {"crop_size": 48, "patch_size": 8, "dataset_fpcs": [4], "batch_size": 3},
            # With a small eps the first steps are lr times the signs of gradients, some of which are rounding alone.
            "optimization": {
                "epochs": 2 if clip_grad is None else 8,
                "ipe": 20 if clip_grad is None else 5,
                "warmup": 0.5,
                "loss_reg_std_mult": loss_reg_std_mult,
                "loss_reg_num_tracking_steps": 4,
                "loss_reg_min_epoch": 0,
                "clip_grad": clip_grad,
                "start_lr": 1e-4,
                "lr": 3e-3,
                "final_lr": 1e-3,
                "weight_decay": 0.04,
                "final_weight_decay": 0.4,
                "ema": [0.9, 1.0],
                "eps": 1e-4,
            },
            "train": {"dtype": dtype},
        }
    )


def train_step(cfg: Config, device: str = "cpu") -> TrainStep:
    torch.manual_seed(0)
    return TrainStep(VJEPA.from_config(cfg).to(device), cfg)


def batch(step: int, cfg: Config, device: str = "cpu") -> tuple[Tensor, MaskBatch]:
    clips = torch.randint(0, 256, (3, 4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return clips.to(device), MaskSampler(cfg.mask, (2, 6, 6), 0)(step, range(3 * step, 3 * step + 3), device)


def expected(cfg: Config, num_steps: int = 20) -> list[Sizes]:
    return [Sizes.of(batch(step, cfg)[1]) for step in range(num_steps)]


def assert_same(ours: torch.nn.Module, oracle: torch.nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + b.numel() ** 0.5 * 1e-2), name


CASES = {
    "plain": {},
    "no truncation, variance term": {"truncate": "none", "reg_coeff": 0.1},
    # Clipped from the sixth of ten steps on, when all is captured.
    "sincos, swiglu, recomputed, a token for each mask, clipped": {
        "use_rope": False,
        "use_silu": True,
        "use_pred_silu": True,
        "activation_checkpointing": "full",
        "mask_token_by": "mask",
        "clip_grad": 0.05,
    },
    # The weight of the context tokens' loss grows from the third to the eighth of ten steps.
    "V-JEPA 2.1": {
        "depth": 4,
        "rope_style": "interleaved",
        "n_output_distillation": 4,
        "img_temporal_dim_size": 1,
        "modality_embedding": True,
        "interpolate_rope": True,
        "loss": {"predict_all": True, "weight_distance_loss": True, "lambda_warmup": [2, 7]},
    },
    "drop path, half precision": {"drop_path_rate": 0.5, "dtype": "bfloat16"},
}
