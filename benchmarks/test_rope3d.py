"""Rotation of queries and keys in place, for the context tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.timing import randn
from benchmarks.workload import Workload
from vjepa_fast.ops.rope3d import Rope, Style, rope_tables, token_positions


@pytest.mark.parametrize("style", ["tiled", "interleaved"])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_rope3d(
    measure: Callable[..., None], workload: Workload, device: torch.device, mode: str, style: Style
) -> None:
    ids = workload.masks(device).context_ids
    heads, head_dim = workload.num_heads, workload.width // workload.num_heads
    rope = Rope(*rope_tables(token_positions(ids, *workload.grid[1:]), head_dim, style, torch.float32))
    qkv = randn(len(ids), 3 * workload.width, device=device, dtype=workload.torch_dtype)
    grad = torch.randn_like(qkv)
    rotated = 2 * len(ids) * heads * rope.cos.shape[-1] * qkv.element_size()
    num_bytes = 2 * rotated + rope.cos.nbytes + rope.sin.nbytes

    def forward() -> None:
        rope(qkv, heads)

    # A leaf may not be changed in place; this is what the projection before it hands over.
    leaf = qkv.clone().requires_grad_()

    def forward_backward() -> None:
        leaf.grad = None
        rope(leaf + 0, heads).backward(grad)

    if mode == "forward":
        measure(forward, num_bytes=num_bytes)
    else:
        # With the copy that stands in for the projection: one read and one write of the buffer.
        measure(forward_backward, num_bytes=2 * num_bytes + 2 * qkv.nbytes)


def test_rope_tables(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    """Once a buffer, shared by all layers."""
    ids = workload.masks(device).context_ids
    positions = token_positions(ids, *workload.grid[1:])
    head_dim = workload.width // workload.num_heads
    tables = rope_tables(positions, head_dim, "tiled", torch.float32)
    measure(lambda: Rope(*rope_tables(positions, head_dim, "tiled", torch.float32)),
            num_bytes=positions.nbytes + sum(table.nbytes for table in tables))
