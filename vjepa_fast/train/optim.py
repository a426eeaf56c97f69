"""AdamW that also moves the target encoder and refreshes the half-precision shadows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.vit import COMPUTE_DTYPES
from vjepa_fast.ops.linear import shadow_of, vouch


def parameter_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict[str, Any]]:
    """The reference's four groups, in its order, so that its optimizer state fits.

    Encoder weights, predictor weights, then without decay the biases and vectors of both (facebookresearch/vjepa2,
    app/vjepa/utils.py:227-241). Frozen position tables are listed too, as there.
    """

    def select(module: nn.Module, decayed: bool) -> list[nn.Parameter]:
        return [p for name, p in module.named_parameters() if (("bias" in name) or p.ndim == 1) != decayed]

    undecayed = {"WD_exclude": True, "weight_decay": 0}
    return [
        {"params": select(encoder, True)},
        {"params": select(predictor, True)},
        {"params": select(encoder, False), **undecayed},
        {"params": select(predictor, False), **undecayed},
    ]


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * source, over all parameters, in their own precision."""
    moved: list[Tensor] = list(target.parameters())
    followed: list[Tensor] = list(source.parameters())
    torch._foreach_mul_(moved, momentum)
    torch._foreach_add_(moved, followed, alpha=1 - momentum)


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW on encoder and predictor; each step also moves the target encoder.

    Args:
        model: the VJEPA whose parameters are trained.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; biases and vectors are not decayed.
        momentum: of the target encoder; assign `optimizer.momentum` to change it between steps.
    """

    def __init__(
        self,
        model: VJEPA,
        lr: float = 5.25e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.04,
        momentum: float = 0.99925,
    ) -> None:
        groups = parameter_groups(model.encoder, model.predictor)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.model = model
        self.momentum = momentum
        self.dtype = COMPUTE_DTYPES[model.cfg.dtype]
        self.found_inf: Tensor | None = None
        """Set to a scalar tensor before `step`: 1 leaves weights and moments as they are (decided on the device)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of weights, target encoder and shadows. The target encoder moves even if `found_inf` is 1."""
        # torch's fused AdamW reads self.found_inf.
        loss = super().step(closure)
        self.found_inf = None
        ema_update(self.model.target_encoder, self.model.encoder, self.momentum)
        if self.dtype != torch.float32:
            self.refresh_shadows()
        return loss

    @torch.no_grad()
    def refresh_shadows(self) -> None:
        """Write the shadow of every matrix and bias this optimizer trains, and vouch for it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.ndim in (1, 2):
                    vouch(parameter, shadow_of(parameter, self.dtype))
