"""Counts a model's parameters on modules without memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops.linear import Linear


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements."""

    encoder: int
    """Trained."""
    predictor: int
    """Trained."""
    target: int
    """Parameters of the target encoder, fixed position tables included."""
    linear: int
    """Parameters among `trained` that have a half-precision shadow."""
    target_linear: int
    """Parameters among `target` that have a half-precision shadow."""

    @property
    def trained(self) -> int:
        return self.encoder + self.predictor


def count_parameters(cfg: ModelConfig) -> Parameters:
    """Of encoder, predictor and target encoder."""
    return _count(cfg.model_dump_json(exclude={"dtype", "activation_checkpointing", "use_activation_checkpointing"}))


@cache
def _count(text: str) -> Parameters:
    """Of a config without what has no part in it, as JSON: it is asked for again and again with other such values."""
    cfg = ModelConfig.model_validate_json(text)
    with torch.device("meta"):
        model = VJEPA(cfg)

    def trained(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    def linear(module: nn.Module) -> int:
        return sum(p.numel() for m in module.modules() if isinstance(m, Linear) for p in m.parameters())

    return Parameters(
        trained(model.encoder),
        trained(model.predictor),
        sum(p.numel() for p in model.target_encoder.parameters()),
        linear(model.encoder) + linear(model.predictor),
        linear(model.target_encoder),
    )
