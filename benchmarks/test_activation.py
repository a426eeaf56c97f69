"""The activations between the linear layers of the MLP, for the context tokens of a batch.

`plain` is PyTorch's own expression and `compiled` what Inductor makes of it, so that one run tells which of the three
is to be used. Traffic is counted as the fused operation needs it, so PyTorch's two-kernel SwiGLU shows a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.activation import gelu, gelu_ref, swiglu, swiglu_ref

_EXPRESSIONS = {"gelu": (gelu, gelu_ref, 1), "swiglu": (swiglu, swiglu_ref, 2)}


@pytest.mark.parametrize("by", ["ours", "plain", "compiled"])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", _EXPRESSIONS)
def test_activation(
    measure: Callable[..., None], workload: Workload, device: torch.device, name: str, mode: str, by: str
) -> None:
    ours, plain, num_inputs = _EXPRESSIONS[name]
    # dynamic=True: token counts differ from step to step.
    function = {"ours": ours, "plain": plain, "compiled": torch.compile(plain, dynamic=True)}[by]
    count, hidden = len(workload.masks(device).context_ids), 4 * workload.width
    inputs = [
        randn(count, hidden, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
        for _ in range(num_inputs)
    ]
    grad = randn(count, hidden, device=device, dtype=workload.torch_dtype)

    def forward_backward() -> None:
        for x in inputs:
            x.grad = None
        function(*inputs).backward(grad)

    forward_bytes, forward_flops = (num_inputs + 1) * grad.nbytes, 12 * grad.numel()
    if mode == "forward":
        with torch.no_grad():
            measure(lambda: function(*inputs), num_bytes=forward_bytes, flops=forward_flops)
    else:
        measure(
            forward_backward,
            num_bytes=forward_bytes + (2 * num_inputs + 1) * grad.nbytes,
            flops=forward_flops + 20 * grad.numel(),
        )
