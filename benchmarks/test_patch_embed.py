"""Tubelets to tokens, for the context tokens of a batch and for all of its tokens, these also with positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.patch_embed import patch_embed


@pytest.mark.parametrize("tokens", ["context", "all", "all with positions"])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_patch_embed(
    measure: Callable[..., None], workload: Workload, device: torch.device, mode: str, tokens: str
) -> None:
    clips, dtype = workload.clips(device), workload.torch_dtype
    data = workload.config.data
    kernel = (data.tubelet_size, data.patch_size, data.patch_size)
    projection = torch.nn.Conv3d(3, workload.width, kernel, kernel).to(device)
    weight, bias = projection.weight, projection.bias
    assert bias is not None
    masks = workload.masks(device)
    rows = masks.context_rows if tokens == "context" else None
    count = masks.batch_size * masks.num_tokens if rows is None else len(rows)
    table = torch.randn(masks.num_tokens, workload.width, device=device) if tokens == "all with positions" else None
    pixels = 3 * kernel[0] * kernel[1] * kernel[2]

    def forward() -> torch.Tensor:
        return patch_embed(clips, weight, bias, rows, dtype, table)

    grad = torch.randn_like(forward())

    def forward_backward() -> None:
        weight.grad = bias.grad = None
        forward().backward(grad)

    flops = 2 * count * pixels * workload.width
    num_bytes = count * pixels + weight.nbytes + grad.nbytes + (0 if table is None else table.nbytes)
    if mode == "forward":
        with torch.no_grad():
            measure(forward, num_bytes=num_bytes, flops=flops)
    else:
        # The pixels need no gradient. The backward reads them and the output's gradient and writes the weight's.
        measure(forward_backward, num_bytes=2 * num_bytes, flops=2 * flops)
