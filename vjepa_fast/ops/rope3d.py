"""Rotary position embedding over (time, height, width), applied to queries and keys in the packed qkv buffer.

Each of the three axes owns d = 2 * ((head_dim // 3) // 2) elements of a head, in the order time, height, width; what is
left over is not rotated. Within an axis, angle i of position p is p * 10000 ** (-2 i / d) with i < d / 2. The elements
2j and 2j + 1 form a pair (a, b) that becomes (a cos - b sin, b cos + a sin). Two forms exist:

`interleaved` gives both elements of pair j the angle j: a rotation (V-JEPA 2.1).
`tiled` gives element e the angle e mod (d / 2), so the two elements of a pair turn by different angles. This is what
V-JEPA 2 was trained with (facebookresearch/vjepa2, src/models/utils/modules.py, rotate_queries_or_keys) and what its
checkpoints need. It is no rotation, so the gradient takes the transpose, which is not the inverse.

And two precisions: `fp32` has exact angles and rounds a half-precision result once. `reference` rounds to the dtype of
the queries wherever the reference does under autocast: i / (d / 2), the frequencies, the angles, sine and cosine, both
products and their sum. With fp32 operands the two are the same.

Fused: positions from token ids, the lookup of sine and cosine, the rotation of all queries and keys of a token, in
place; the backward writes a new buffer, as nobody else may see its incoming gradient changed, and carries the gradient
of the values over. Sine and cosine come from one table a step with a row for each position of each axis, a few kB that
stay in the cache. So a token costs its id, 4 bytes, where three positions would cost 12 and its own row of a table 8 R.

On a CPU, fp32 and fp64 buffers are rotated by the same rule in C++ (csrc/rope3d.cpp) where the extension is built.

Bytes of a token, with s the size of an element: forward 4 H R s + 4, backward 6 H head_dim s + 4. FLOPs: 6 H R either
way, so that memory bounds it.

Legend: L tokens, (T, h, w) the grid, H heads, R = 3 d rotated elements of a head.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vjepa_fast.common import extension
from vjepa_fast.ops._rope3d_kernels import _rope3d_kernel
from vjepa_fast.ops.triton_support.dispatch import launch, rows_contiguous, use_triton

Style = Literal["tiled", "interleaved"]
Precision = Literal["fp32", "reference"]
Grid = tuple[int, int, int]
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


def join_ids(ids: Sequence[Tensor], grids: Sequence[Grid]) -> tuple[Tensor, Grid]:
    """Tokens of several grids, with their ids on the smallest grid that holds them all.

    Args:
        ids: integer [L_i] each.
        grids: (T, h, w) of each.

    Returns:
        [sum of L_i] and the common grid.
    """
    num_frames, height, width = (max(sides) for sides in zip(*grids, strict=True))
    parts = []
    for part, own in zip(ids, grids, strict=True):
        if own[1:] != (height, width):
            frame, row, column = token_positions(part, *own[1:]).unbind(-1)
            part = (frame * height + row) * width + column
        parts.append(part)
    return torch.cat(parts), (num_frames, height, width)


def rope_tables(
    grid: Grid,
    head_dim: int,
    dtype: torch.dtype,
    style: Style,
    precision: Precision,
    scale: tuple[float, float, float],
    device: torch.device,
) -> Tensor:
    """Cosine and sine of every rotated element of an axis, for every position of each axis.

    Args: as Rope.

    Returns:
        [3, T + h + w, d], fp32 or wider; rows of time, height, width. Element 2j of table 1 holds -sin and element
        2j + 1 holds sin, so that x * cos + (x with the elements of each pair exchanged) * table 1 is the rotation.
        Table 2, in place of table 1, gives the transpose.
    """
    width = axis_width(head_dim)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = dtype if precision == "reference" else wide
    exponents = torch.arange(width // 2, dtype=narrow, device=device) / (width / 2.0)
    omega = 1.0 / BASE ** exponents.to(wide)
    positions = torch.cat(
        [torch.arange(count, dtype=wide, device=device) * factor for count, factor in zip(grid, scale, strict=True)]
    )
    angles = positions[:, None].to(narrow) * omega.to(narrow)
    angles = angles.repeat(1, 2) if style == "tiled" else angles.repeat_interleave(2, dim=-1)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    even, odd = sin.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(
        [cos, torch.stack([-even, odd], dim=-1).flatten(-2), torch.stack([odd, -even], dim=-1).flatten(-2)]
    )


def _quarter_turn(x: Tensor) -> Tensor:
    """(b, -a) of every pair (a, b) of the last dimension."""
    even_layout = x.stride(-1) == 1 and all(n % 2 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))
    if x.dtype in (torch.float32, torch.float64) and even_layout and not torch.compiler.is_compiling():
        # The product with -i, exact for finite numbers, is vectorised on a CPU, where exchanging elements is not.
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * -1j).flatten(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([odd, -even], dim=-1).flatten(-2)


def rope3d_ref_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    """x = x * cos + quarter_turn(x) * sin for the rotated elements x of queries and keys, in place.

    Args:
        qkv: [L, 3 * H * head_dim].
        cos, sin: [L, R] of the tables, sin with every odd element negated; in half precision every product is rounded.
        num_heads: H.
    """
    x = qkv.view(len(qkv), 3, num_heads, qkv.shape[1] // (3 * num_heads))[:, :2, :, : cos.shape[-1]]
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = _quarter_turn(x)
    if x.dtype == cos.dtype and x.dtype in (torch.float32, torch.float64):
        x.mul_(cos).addcmul_(turned, sin)
    else:
        x.copy_(x * cos + turned * sin)


_OPERANDS = "Tensor ids, Tensor cos, Tensor sin, int[3] grid, int num_heads, bool rounds"
torch.library.define("vjepa_fast::rope3d_fwd", f"(Tensor(a!) qkv, {_OPERANDS}) -> ()")
torch.library.define("vjepa_fast::rope3d_bwd", f"(Tensor grad, {_OPERANDS}) -> Tensor grad_qkv")


@torch.library.register_fake("vjepa_fast::rope3d_fwd")
def _fwd_outputs(
    qkv: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, grid: Sequence[int], num_heads: int, rounds: bool
) -> None:
    return None


@torch.library.register_fake("vjepa_fast::rope3d_bwd")
def _bwd_output(
    grad: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, grid: Sequence[int], num_heads: int, rounds: bool
) -> Tensor:
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)


def _launch(
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: Sequence[int],
    num_heads: int,
    rounds: bool,
    parts: int,
) -> None:
    """The first `parts` of queries, keys and values from x to y, queries and keys rotated."""
    count, head_dim = len(x), x.shape[1] // (3 * num_heads)
    cols = max(2, 1 << (head_dim - 1).bit_length())
    # A program walks over the heads in blocks: the largest of those that leave the fewest lanes idle. It has few
    # tokens, as each keeps its sines and cosines in registers, but at least 1024 elements, 8 for each thread: were they
    # fewer, two threads would load an element that one of them changes.
    rows = min((32, 16, 8), key=lambda size: -(-parts * num_heads // size) * size)
    tokens = max(1, 1024 // (rows * cols))
    launch(
        _rope3d_kernel,
        (-(-count // tokens),),
        x,
        y,
        ids.contiguous(),
        cos,
        sin,
        x.stride(0),
        y.stride(0),
        count,
        *grid,
        parts * num_heads,
        2 * num_heads,
        HEAD_DIM=head_dim,
        AXIS=cos.shape[1],
        ROUND=rounds,
        TOKENS=tokens,
        ROWS=rows,
        COLS=cols,
        num_warps=4,
    )


def _rope3d_fwd(
    qkv: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, grid: Sequence[int], num_heads: int, rounds: bool
) -> None:
    _launch(qkv, qkv, ids, cos, sin, grid, num_heads, rounds, parts=2)


def _rope3d_bwd(
    grad: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, grid: Sequence[int], num_heads: int, rounds: bool
) -> Tensor:
    out = _bwd_output(grad, ids, cos, sin, grid, num_heads, rounds)
    _launch(rows_contiguous(grad), out, ids, cos, sin, grid, num_heads, rounds, parts=3)
    return out


torch.library.impl("vjepa_fast::rope3d_fwd", ("cpu", "cuda"), _rope3d_fwd)
torch.library.impl("vjepa_fast::rope3d_bwd", ("cpu", "cuda"), _rope3d_bwd)


class _Rope3d(torch.autograd.Function):
    """By the kernels. Linear in its input, so that only ids and tables are kept for the backward."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, qkv: Tensor, ids: Tensor, tables: Tensor, grid: Grid, num_heads: int, rounds: bool
    ) -> Tensor:
        ctx.save_for_backward(ids, tables)
        ctx.options = grid, num_heads, rounds
        ctx.mark_dirty(qkv)
        torch.ops.vjepa_fast.rope3d_fwd(qkv, ids, tables[0], tables[1], *ctx.options)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        ids, tables = ctx.saved_tensors
        return torch.ops.vjepa_fast.rope3d_bwd(grad, ids, tables[0], tables[2], *ctx.options), *[None] * 5


class _Rope3dCpu(torch.autograd.Function):
    """By C++."""

    @staticmethod
    def forward(ctx, qkv: Tensor, ids: Tensor, tables: Tensor, grid: Grid, num_heads: int):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids, tables)
        ctx.options = grid, num_heads
        ctx.mark_dirty(qkv)
        torch.ops.vjepa_fast.rope3d_rotate(qkv, qkv, ids, tables[0], tables[1], *ctx.options)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        ids, tables = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype)
        torch.ops.vjepa_fast.rope3d_rotate(rows_contiguous(grad), out, ids, tables[0], tables[2], *ctx.options)
        return out, *[None] * 4


class _Rope3dRef(torch.autograd.Function):
    """By PyTorch, with tables for each token."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, qkv: Tensor, cos: Tensor, sin: Tensor, sin_back: Tensor, num_heads: int
    ) -> Tensor:
        ctx.save_for_backward(cos, sin_back)
        ctx.num_heads = num_heads
        ctx.mark_dirty(qkv)
        rope3d_ref_(qkv, cos, sin, num_heads)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        cos, sin_back = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        rope3d_ref_(grad, cos, sin_back, ctx.num_heads)
        return grad, None, None, None, None


def _use_compiled(tables: Tensor, dtype: torch.dtype) -> bool:
    """Whether C++ serves. A graph that is traced, perhaps for others to run, holds PyTorch's operators only."""
    if type(tables) is not Tensor or tables.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return False
    return not (torch.compiler.is_compiling() or os.environ.get("VJEPA_FAST_OPS")) and extension.load().path is not None


class Rope:
    """Rotation of one buffer of tokens, its tables made once and shared by all layers.

    Args:
        ids: integer [L], token ids on the grid, all within it. An action or state token, which the reference rotates
            in time only (facebookresearch/vjepa2, src/models/utils/modules.py, ACRoPEAttention), takes the id of the
            first token of its frame: angle 0 of row 0 and column 0 leaves the other two axes as they are.
        grid: (T, h, w) in tokens. Not checked: ids of frames >= T.
        head_dim: width of a head, at least 6.
        dtype: of the queries and keys; angles are fp64 for fp64 and fp32 for the others.
        style, precision: see the module docstring.
        scale: factors of the positions along time, height and width, for a grid other than the one trained on:
            (train - 1) / (now - 1) is V-JEPA 2.1's interpolation, train / now the snapping of the action-conditioned
            predictor.
    """

    def __init__(
        self,
        ids: Tensor,
        grid: Grid,
        head_dim: int,
        dtype: torch.dtype,
        style: Style = "tiled",
        precision: Precision = "fp32",
        scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.ids, self.grid, self.head_dim, self.dtype = ids, grid, head_dim, dtype
        self.rounds = precision == "reference" and dtype in (torch.bfloat16, torch.float16)
        self.tables = rope_tables(grid, head_dim, dtype, style, precision, scale, ids.device)
        self.by_token: tuple[Tensor, ...] | None = None
        self.compiled = _use_compiled(self.tables, dtype)
        if self.compiled:
            self.ids = ids.to(torch.int32).contiguous()
        elif not use_triton(self.tables):
            # PyTorch needs a row for each token, [L, R] in each table.
            frame, row, column = token_positions(ids, *grid[1:]).unbind(-1)
            rows = torch.stack([frame, grid[0] + row, grid[0] + grid[1] + column], dim=-1).flatten()
            tables = self.tables.to(dtype) if self.rounds else self.tables
            cos, *sines = tables.unbind(0)
            # See rope3d_ref_.
            signs = 1 - 2 * (torch.arange(cos.shape[-1], device=ids.device) % 2)
            tables = torch.stack([cos, *(sine * signs for sine in sines)])
            width = 3 * tables.shape[-1]
            self.by_token = tuple(table.index_select(0, rows).view(len(ids), width) for table in tables.unbind(0))

    def __call__(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Rotates queries and keys in place and returns the buffer.

        Args:
            qkv: [L, 3 * H * head_dim], rows may be strided; not a view of a tensor that anything else still needs.
            num_heads: H.

        Raises:
            ValueError: another shape or dtype, or elements of a row that are not side by side.
        """
        wanted = [len(self.ids), 3 * num_heads * self.head_dim]
        if list(qkv.shape) != wanted or qkv.dtype != self.dtype:
            raise ValueError(
                f"qkv has shape {list(qkv.shape)} and dtype {qkv.dtype}; expected {wanted} and {self.dtype}"
            )
        if qkv.stride(-1) != 1 or (len(qkv) > 1 and qkv.stride(0) < qkv.shape[1]):
            raise ValueError(
                f"qkv has strides {qkv.stride()}; expected rows whose elements are side by side, and that "
                "do not overlap"
            )
        out: Tensor
        if self.compiled:
            out = _Rope3dCpu.apply(qkv, self.ids, self.tables, self.grid, num_heads)
        elif self.by_token is None:
            out = _Rope3d.apply(qkv, self.ids, self.tables, self.grid, num_heads, self.rounds)
        else:
            out = _Rope3dRef.apply(qkv, *self.by_token, num_heads)
        return out


def rope3d(
    qkv: Tensor,
    ids: Tensor,
    grid: Grid,
    num_heads: int,
    style: Style = "tiled",
    precision: Precision = "fp32",
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """One rotation with tables of its own; arguments, result and errors as Rope."""
    head_dim = qkv.shape[-1] // (3 * num_heads)
    return Rope(ids, grid, head_dim, qkv.dtype, style, precision, scale)(qkv, num_heads)
