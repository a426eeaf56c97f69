"""Layer norm of the context tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
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
            measure(lambda: norm(x), num_bytes=2 * x.nbytes, flops=8 * x.numel())
    else:
        measure(forward_backward, num_bytes=5 * x.nbytes, flops=22 * x.numel())


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("by", ["fused", "separate"])
def test_add_layer_norm(
    measure: Callable[..., None], workload: Workload, device: torch.device, by: str, mode: str
) -> None:
    """The residual add within the norm, and before it; traffic is counted as the fused form needs it."""
    count = len(workload.masks(device).context_ids)
    norm = LayerNorm(workload.width, eps=1e-6).to(device)
    x, branch = (
        randn(count, workload.width, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
        for _ in range(2)
    )
    grad_sum, grad = torch.randn_like(x), torch.randn_like(x)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        if by == "fused":
            return norm.add(x, branch)
        total = x + branch
        return total, norm(total)

    def forward_backward() -> None:
        norm.zero_grad(set_to_none=True)
        x.grad = branch.grad = None
        torch.autograd.backward(forward(), (grad_sum, grad))

    if mode == "forward":
        with torch.no_grad():
            measure(forward, num_bytes=4 * x.nbytes, flops=9 * x.numel())
    else:
        measure(forward_backward, num_bytes=8 * x.nbytes, flops=24 * x.numel())
