"""Sizes, styles and operands of the tests of rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

GRID = (6, 3, 4)


STYLES = ["tiled", "interleaved"]


HALVES = [torch.bfloat16, torch.float16]


def operands(
    count: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, its incoming gradient, ids."""
    g = torch.Generator().manual_seed(count * 10007 + head_dim)
    rows = [torch.randn(count, 3 * num_heads * head_dim, generator=g).to(device, dtype) for _ in range(2)]
    return rows[0], rows[1], torch.randint(GRID[0] * 12, (count,), generator=g, dtype=torch.int32).to(device)
