"""Rotary position embedding over (time, height, width), applied to queries and keys in the packed qkv buffer.

Each of the three axes owns d = 2 * ((head_dim // 3) // 2) elements of a head, in the order time, height, width; what is
left over is not rotated. Within an axis, angle i of position p is p * 10000 ** (-2 i / d) with i < d / 2. The elements
2j and 2j + 1 form a pair (a, b) that becomes (a cos - b sin, b cos + a sin). Two forms exist:

`interleaved` gives both elements of pair j the angle j: a rotation (V-JEPA 2.1).
`tiled` gives element e the angle e mod (d / 2), so the two elements of a pair turn by different angles. This is what
V-JEPA 2 was trained with (facebookresearch/vjepa2, src/models/utils/modules.py, rotate_queries_or_keys) and what its
checkpoints need.

Bytes per call: qkv is read once and the rotated two thirds are written back in place; the tables are read once.

Legend: L tokens, H heads, R = 3 d rotated elements of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Style = Literal["tiled", "interleaved"]
BASE = 10000.0


def axis_width(head_dim: int) -> int:
    """Elements of a head that one axis rotates."""
    return 2 * ((head_dim // 3) // 2)


def token_positions(ids: Tensor, height: int, width: int) -> Tensor:
    """Time, row and column of tokens.

    Args:
        ids: integer [L], token ids on a grid of any number of frames.
        height, width: tokens of a frame.

    Returns:
        int64 [L, 3].
    """
    ids = ids.long()
    inside = ids % (height * width)
    return torch.stack([ids // (height * width), inside // width, inside % width], dim=-1)


def rope_tables(positions: Tensor, head_dim: int, style: Style, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotated element of every token.

    Args:
        positions: integer [L, 3].
        head_dim: width of a head.
        style: see the module docstring.
        dtype: of the angles and of the result, torch.float32 or torch.float64.

    Returns:
        Two tensors [L, R].
    """
    width = axis_width(head_dim)
    omega = torch.arange(width // 2, dtype=dtype, device=positions.device)
    omega = 1.0 / BASE ** (omega / (width / 2.0))
    angles = positions[..., None].to(dtype) * omega
    spread = angles.repeat(1, 1, 2) if style == "tiled" else angles.repeat_interleave(2, dim=-1)
    flat = spread.flatten(-2)
    return flat.cos(), flat.sin()


class _Rope3d(torch.autograd.Function):
    """In place; linear in its input, so that only the tables are kept for the backward."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, qkv: Tensor, cos: Tensor, sin: Tensor, sin_back: Tensor, num_heads: int
    ) -> Tensor:
        ctx.save_for_backward(cos, sin_back)
        ctx.num_heads = num_heads
        ctx.mark_dirty(qkv)
        _turn(qkv, cos, sin, num_heads)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        cos, sin_back = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        _turn(grad, cos, sin_back, ctx.num_heads)
        return grad, None, None, None, None


def _swap(x: Tensor) -> Tensor:
    """Elements 2j and 2j + 1 of the last dimension exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _alternate(x: Tensor, even: float, odd: float) -> Tensor:
    """Even and odd elements of the last dimension times a factor each."""
    return x * torch.tensor([even, odd], dtype=x.dtype, device=x.device).repeat(x.shape[-1] // 2)


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    """x = x * cos + swap(x) * sin for the rotated elements x of queries and keys, in place."""
    x = qkv.view(qkv.shape[0], 3, num_heads, -1)[:, :2, :, : cos.shape[-1]]
    cos, sin = cos[:, None, None], sin[:, None, None]
    swapped = _swap(x)
    if x.dtype == cos.dtype:
        x.mul_(cos).addcmul_(swapped, sin)
    else:
        # Half precision is rounded once, at the end.
        x.copy_(x * cos + swapped * sin)


class Rope:
    """Rotation of one buffer of tokens, its tables made once and shared by all layers.

    Args:
        cos, sin: [L, R] of rope_tables; the arithmetic is done in their precision.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        # (a, b) becomes (a, b) * cos + (b, a) * (-sin_a, sin_b). The transpose, for the gradient, gives each element
        # its partner's gradient times the partner's sine: (g_a, g_b) * cos + (g_b, g_a) * (sin_b, -sin_a).
        self.sin = _alternate(sin, -1.0, 1.0)
        self.sin_back = _alternate(_swap(sin), 1.0, -1.0)

    def __call__(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Rotates queries and keys in place and returns the buffer.

        Args:
            qkv: [L, 3 * H * head_dim], contiguous, not a view of a tensor that anything else still needs.
            num_heads: H.
        """
        return _Rope3d.apply(qkv, self.cos, self.sin, self.sin_back, num_heads)


def rope3d(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """One rotation with tables of its own; arguments as Rope."""
    return Rope(cos, sin)(qkv, num_heads)


__all__ = ["Rope", "Style", "axis_width", "rope3d", "rope_tables", "token_positions"]
