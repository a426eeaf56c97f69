"""The four products of a block, for the tokens of target encoder and context encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
from vjepa_fast.cost import flops
from vjepa_fast.ops.linear import Linear

_OUTPUTS_AND_INPUTS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}


@pytest.mark.parametrize("layer", _OUTPUTS_AND_INPUTS)
@pytest.mark.parametrize(("part", "mode"), [("target", "forward"), ("context", "forward_backward")])
def test_linear(
    measure: Callable[..., None], workload: Workload, device: torch.device, part: str, mode: str, layer: str
) -> None:
    masks = workload.masks(device)
    count = masks.batch_size * masks.num_tokens if part == "target" else len(masks.context_ids)
    outputs, inputs = (factor * workload.width for factor in _OUTPUTS_AND_INPUTS[layer])
    product = Linear(inputs, outputs).to(device)
    x = randn(count, inputs, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
    grad = randn(count, outputs, device=device, dtype=workload.torch_dtype)
    work = flops.linear(count, inputs, outputs)
    num_bytes = x.nbytes + product.weight.nbytes + grad.nbytes

    def forward_backward() -> None:
        product.zero_grad(set_to_none=True)
        x.grad = None
        product(x).backward(grad)

    if mode == "forward":
        with torch.no_grad():
            measure(lambda: product(x), num_bytes=num_bytes, flops=work)
    else:
        measure(forward_backward, num_bytes=3 * num_bytes, flops=3 * work)
