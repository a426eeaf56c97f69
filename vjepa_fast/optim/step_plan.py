"""What the steps of AdamWEMA have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops.adamw_ema import Operands
from vjepa_fast.optim.dtensors import Shards


@dataclass
class StepPlan:
    """What steps have in common, so that it is not collected anew from hundreds of parameters each time."""

    signature: list[Any]
    """Where parameters and targets lie, which have gradients, which moments they have: with another, another plan."""
    parameters: list[Tensor]
    shards: list[Shards]
    operands: Operands
    """All but the gradients, which lie elsewhere at each step."""
    parts: tuple[list[int], list[int]]
    """Which of them are the encoder's, and which the predictor's."""
    fits: bool
    """Whether the kernels can take them."""

    def clip(self, sums: Sequence[Tensor], limit: Tensor | float) -> None:
        """Scale the gradients of encoder and predictor down to that norm, given the sums of their squares."""
        if not isinstance(limit, Tensor) and not math.isfinite(limit):
            return
        for members, part in zip(self.parts, sums, strict=True):
            own = [grad for i in members if (grad := self.operands.grads[i]) is not None]
            if own:
                # As torch.nn.utils.clip_grad_norm_.
                torch._foreach_mul_(own, (limit / (part.sqrt() + 1e-6)).clamp(max=1.0))
