"""A small model, its gradients, and steps of AdamWEMA and of torch on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.optim.adamw_ema import AdamWEMA, parameter_groups


def make_model(dtype: str = "float32") -> VJEPA:
    cfg = Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 24,
                "depth": 1,
                "num_heads": 2,
                "pred_embed_dim": 12,
                "pred_depth": 1,
                "pred_num_heads": 2,
            },
            "data": {"crop_size": 16, "patch_size": 8, "dataset_fpcs": [4]},
            "train": {"dtype": dtype},
        }
    )
    torch.manual_seed(0)
    return VJEPA.from_config(cfg)


def gradients_of_step(model: VJEPA, step: int) -> dict[str, Tensor]:
    """Of very different sizes; one parameter has none."""
    generator = torch.Generator().manual_seed(step)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        name: torch.randn(p.shape, generator=generator) * 10.0 ** (number % 7 - 5)
        for number, (name, p) in enumerate(named)
        if name != "predictor.mask_tokens.1"
    }


def give_gradients(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name].clone() if name in grads else None


def set_values(optimizer: torch.optim.Optimizer, step: int) -> float:
    """Learning rate and weight decay of a step, and its momentum, which is returned too."""
    momentum = 0.99 + 1e-4 * step
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (1 + step % 5)
        if "ema_momentum" in group:
            group["ema_momentum"] = momentum
        if not group.get("WD_exclude"):
            group["weight_decay"] = 0.04 + 1e-3 * step
    return momentum


def reference_step(optimizer: torch.optim.Optimizer, model: VJEPA, step: int) -> None:
    """torch's AdamW, then the two passes of the reference's moving average."""
    momentum = set_values(optimizer, step)
    optimizer.step()
    with torch.no_grad():
        for k, q in zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True):
            k.mul_(momentum)
            k.add_(q * (1 - momentum))


def our_step(optimizer: AdamWEMA, step: int) -> None:
    set_values(optimizer, step)
    optimizer.step()


def torch_adamw(model: VJEPA) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model.encoder, model.predictor), lr=1e-3, foreach=False)


def assert_equal_runs(ours: VJEPA, plain: VJEPA, tolerance: float = 1e-6) -> None:
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name
