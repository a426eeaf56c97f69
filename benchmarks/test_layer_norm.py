"""Layer norm of the context tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.timing import randn
from benchmarks.workload import Workload
from vjepa_fast.ops.layer_norm import LayerNorm


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_layer_norm(measure: Callable[..., None], workload: Workload, device: torch.device, mode: str) -> None:
    count = len(workload.masks(device).context_ids)
    norm = LayerNorm(workload.width, eps=1e-6).to(device)
    x = randn(count, workload.width, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
    grad = torch.randn_like(x)

    def forward_backward() -> None:
        norm.zero_grad(set_to_none=True)
        x.grad = None
        norm(x).backward(grad)

    if mode == "forward":
        with torch.no_grad():
            measure(lambda: norm(x), num_bytes=2 * x.nbytes)
    else:
        measure(forward_backward, num_bytes=5 * x.nbytes)
