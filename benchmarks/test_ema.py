"""The target encoder's update alone, and together with AdamW and the half-precision shadows."""

from __future__ import annotations

from collections.abc import Callable

import torch

import vjepa_fast as vf
from benchmarks.workload import Workload
from vjepa_fast.train.optim import ema_update


def test_ema(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    """Reads both encoders, writes one: 12 bytes a parameter."""
    model = workload.model(device)
    count = sum(p.numel() for p in model.encoder.parameters())
    measure(lambda: ema_update(model.target_encoder, model.encoder, 0.999), num_bytes=12 * count)


def test_adamw_ema(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    """Reads weight, gradient and both moments, writes all but the gradient: 28 bytes a parameter. The target encoder
    adds a read and a write of 4 bytes, a half-precision shadow a write of 2."""
    model = workload.model(device)
    optimizer = vf.AdamWEMA(model, lr=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    num_bytes = 28 * sum(p.numel() for p in trained) + 8 * sum(p.numel() for p in model.encoder.parameters())
    if workload.torch_dtype != torch.float32:
        num_bytes += 2 * sum(p.numel() for p in trained if p.ndim in (1, 2))
    measure(optimizer.step, num_bytes=num_bytes)
