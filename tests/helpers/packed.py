"""A small model's config, clips and masks for one packed step, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.config.schema import Config, MaskSpec
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA

MASKS = [
    MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=4),
    MaskSpec(spatial_scale=(0.6, 0.6), aspect_ratio=(0.75, 1.5), num_blocks=2),
]


def config(truncate: str = "batch_min", fpcs: tuple[int, ...] = (8,), **model) -> Config:
    return Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 48,
                "depth": 3,
                "num_heads": 2,
                "pred_embed_dim": 24,
                "pred_depth": 2,
                "pred_num_heads": 2,
                "zero_init_mask_tokens": False,
                **model,
            },
            "mask": {"masks": MASKS, "truncate": truncate},
            "data": {
                "datasets": ["a"] * len(fpcs),
                "dataset_fpcs": list(fpcs),
                "crop_size": 32,
                "patch_size": 8,
                "batch_size": 3,
            },
        }
    )


def make_batch(cfg: Config, seed: int = 0) -> tuple[list[Tensor], list[MaskBatch]]:
    generator = torch.Generator().manual_seed(seed)
    clips, masks = [], []
    for group, fpc in enumerate(dict.fromkeys(cfg.data.dataset_fpcs)):
        clips.append(torch.randint(0, 256, (3, fpc, 32, 32, 3), dtype=torch.uint8, generator=generator))
        masks.append(MaskSampler(cfg.mask, (fpc // 2, 4, 4), seed, group)(0, range(3)))
    return clips, masks


def gradients(model: VJEPA, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
