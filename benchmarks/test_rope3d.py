"""Rotation of queries and keys in place, for the context tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.rope3d import Rope, Style, axis_width


@pytest.mark.parametrize("style", ["tiled", "interleaved"])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_rope3d(
    measure: Callable[..., None], workload: Workload, device: torch.device, mode: str, style: Style
) -> None:
    ids = workload.masks(device).context_ids
    heads, head_dim = workload.num_heads, workload.width // workload.num_heads
    rope = Rope(ids, workload.grid, head_dim, workload.torch_dtype, style)
    qkv = randn(len(ids), 3 * workload.width, device=device, dtype=workload.torch_dtype)
    grad = torch.randn_like(qkv)
    # Queries and keys are read and written where they are rotated; the gradient becomes a new buffer.
    num_rotated = 2 * len(ids) * heads * 3 * axis_width(head_dim)
    num_bytes, back_bytes = 2 * num_rotated * qkv.element_size() + ids.nbytes, 2 * qkv.nbytes + ids.nbytes
    flops = 3 * num_rotated

    def forward() -> None:
        rope(qkv, heads)

    # A leaf may not be changed in place; this is what the projection before it hands over.
    leaf = qkv.clone().requires_grad_()

    def forward_backward() -> None:
        leaf.grad = None
        rope(leaf + 0, heads).backward(grad)

    if mode == "forward":
        measure(forward, num_bytes=num_bytes, flops=flops)
    else:
        # With the copy that stands in for the projection: one read and one write of the buffer.
        measure(forward_backward, num_bytes=num_bytes + back_bytes + 2 * qkv.nbytes, flops=2 * flops)


def test_rope_tables(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    """Once a buffer, shared by all layers."""
    ids = workload.masks(device).context_ids
    head_dim = workload.width // workload.num_heads

    def build() -> Rope:
        return Rope(ids, workload.grid, head_dim, workload.torch_dtype)

    measure(build, num_bytes=build().tables.nbytes)
