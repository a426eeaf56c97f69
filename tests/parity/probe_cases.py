"""Frozen evaluations that both the reference's probes and ours are trained for: sizes, features, labels, schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import recipe_weights, uniform

NUM_STEPS, STEPS_PER_EPOCH = 3, 2


@dataclass(frozen=True)
class ProbeCase:
    """One probe.

    Attributes:
        version: 1 (facebookresearch/jepa) or 2 (facebookresearch/vjepa2).
        depth: blocks.
        optimization: as in the YAML of an evaluation; epochs of STEPS_PER_EPOCH steps.
        dim, num_heads, num_classes: of the probe.
        batch, tokens: of the features.
        seed: of weights, features and labels.
    """

    name: str
    version: int
    depth: int
    optimization: dict[str, Any] = field(default_factory=dict)
    dim: int = 48
    num_heads: int = 4
    num_classes: int = 5
    batch: int = 6
    tokens: int = 24
    seed: int = 0

    def weights(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Of the start, fp32; without those that V-JEPA 1 has and never uses."""
        return {name: value for name, value in recipe_weights(shapes, self.seed).items() if "xattn.proj" not in name}

    def features(self, step: int) -> Tensor:
        """float64 [batch, tokens, dim]."""
        return uniform(f"{self.seed}/features/{step}", (self.batch, self.tokens, self.dim))

    def labels(self, step: int) -> Tensor:
        """int64 [batch]."""
        return ((uniform(f"{self.seed}/labels/{step}", (self.batch,)) / 12**0.5 + 0.5) * self.num_classes).long()


PROBE_CASES = {
    case.name: case
    for case in (
        # configs/eval/vitl/ssv2.yaml, the first of its 20 heads.
        ProbeCase(
            "probe_v2_depth_4",
            2,
            4,
            {
                "start_lr": 0.005,
                "lr": 0.005,
                "final_lr": 0.0,
                "warmup": 0.0,
                "weight_decay": 0.01,
                "final_weight_decay": 0.01,
                "num_epochs": 20,
            },
        ),
        # With everything that schedules can do.
        ProbeCase(
            "probe_v2_depth_1",
            2,
            1,
            {
                "start_lr": 1e-4,
                "lr": 1e-3,
                "final_lr": 1e-6,
                "warmup": 1.0,
                "weight_decay": 0.8,
                "final_weight_decay": 0.1,
                "num_epochs": 4,
            },
            seed=1,
        ),
        # configs/evals/vitl16_ssv2_16x2x3.yaml.
        ProbeCase(
            "probe_v1_depth_1",
            1,
            1,
            {"start_lr": 0.001, "lr": 0.001, "final_lr": 0.0, "warmup": 0.0, "weight_decay": 0.01, "num_epochs": 20},
            seed=2,
        ),
    )
}

Step = tuple[float, Tensor, dict[str, Tensor], float, float]
"""Loss, outputs [B, C], gradients by name as the optimizer gets them, lr, weight decay."""


@dataclass
class ProbeRun:
    """Three steps of training."""

    steps: list[Step]
    weights: dict[str, Tensor]


def known(name: str, value: Tensor) -> Tensor:
    """What is compared: not the bias of the keys, whose gradient is zero in exact arithmetic."""
    if name.endswith("xattn.kv.bias"):
        return value[len(value) // 2 :]
    if name.endswith("attn.qkv.bias"):
        queries, _, values = value.chunk(3)
        return torch.cat([queries, values])
    return value
