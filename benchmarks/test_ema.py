"""The target encoder's update alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vjepa_fast.bench.workload import Workload
from vjepa_fast.optim.adamw_ema import ema_update


def test_ema(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    """Reads both encoders, writes one: 12 bytes a parameter."""
    model = workload.model(device)
    count = sum(p.numel() for p in model.encoder.parameters())
    measure(lambda: ema_update(model.target_encoder, model.encoder, 0.999), num_bytes=12 * count, flops=2 * count)
