"""A whole optimizer step: gradient norm, AdamW, target encoder, half-precision shadows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.linear import Linear


@pytest.mark.parametrize("clock", ["kernels", "wall"])
def test_adamw_ema(measure: Callable[..., None], workload: Workload, device: torch.device, clock: str) -> None:
    """28 bytes a parameter for weight, gradient and moments, 4 to read the gradient for its norm; 8 for a target, 2 for
    each shadow. `kernels` is the device's own time, `wall` that of a call which starts on an idle device."""
    model = workload.model(device)
    optimizer = vf.AdamWEMA(model, lr=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    num_bytes = 32 * sum(p.numel() for p in trained) + 8 * sum(p.numel() for p in model.encoder.parameters())
    if workload.torch_dtype != torch.float32:
        layers = (layer for layer in model.modules() if isinstance(layer, Linear))
        num_bytes += 2 * sum(p.numel() for layer in layers for p in layer.parameters())
    measure(optimizer.step, num_bytes=num_bytes, flops=22 * sum(p.numel() for p in trained), wall=clock == "wall")
