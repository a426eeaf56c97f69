"""Packed operands, and attention over them sequence by sequence in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vjepa_fast.ops.attention.op import attention
from vjepa_fast.ops.packing import Packing


def pack(lengths: Sequence[int], device: str | torch.device = "cpu", dynamic: bool = False) -> Packing:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Packing(tuple(lengths), ends, dynamic)


def draw(
    packing: Packing, heads: int, head_dim: int, behind: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(packing.total + behind, 4 * heads * head_dim, generator=generator, dtype=torch.float64)
    device = packing.cu_seqlens.device
    qkv, grad = (part.to(device, dtype) for part in drawn.split([3 * heads * head_dim, heads * head_dim], dim=1))
    return qkv.requires_grad_(), grad


def by_loop(qkv: Tensor, grad: Tensor, packing: Packing, heads: int) -> tuple[Tensor, Tensor]:
    """Output and gradient by fp64, sequence by sequence, head by head, in the dtype of qkv."""
    wide = qkv.detach().double().requires_grad_()
    width = qkv.shape[1] // 3
    parts, start = [], 0
    for length in packing.lengths:
        rows = wide[start : start + length]
        columns = []
        for first in range(0, width, width // heads):
            q, k, v = (rows[:, first + third : first + third + width // heads] for third in (0, width, 2 * width))
            scores = torch.exp(q @ k.T / (width // heads) ** 0.5)
            columns.append(scores / scores.sum(1, keepdim=True) @ v)
        parts.append(torch.cat(columns, dim=1))
        start += length
    out = torch.cat([*parts, wide.new_zeros(len(wide) - start, width)])
    (dqkv,) = torch.autograd.grad(out, wide, grad.double())
    return out.detach().to(qkv.dtype), dqkv.to(qkv.dtype)


def ours(qkv: Tensor, grad: Tensor, packing: Packing, heads: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    out = attention(qkv, packing, heads, name)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]
