"""Zeroes the rows behind the last sequence of a packed buffer, in place.

How many they are is read on the device, so that a replayed CUDA graph clears the rows of its own step. Programs whose
rows are all in use write nothing. Bytes: 4 for each program, and those of the rows cleared. FLOPs: none.

Legend: L rows of the buffer, D width, S sequences.
"""

from __future__ import annotations

from torch import Tensor

from vjepa_fast.ops.triton_support.dispatch import jit, launch, tl, use_triton

_BLOCK = 4096


def zero_tail_ref_(x: Tensor, cu_seqlens: Tensor) -> None:
    """The definition."""
    rows = cu_seqlens.new_ones(len(x)).cumsum(0) - 1
    x.masked_fill_((rows >= cu_seqlens[-1])[:, None], 0)


@jit
def _zero_tail_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [L, D]
    cu_seqlens_ptr,  # int32 [S + 1]
    num_sequences,
    size,  # L * D
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    used = tl.load(cu_seqlens_ptr + num_sequences).to(tl.int64) * WIDTH
    if start + BLOCK > used:
        cols = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + cols, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=(cols >= used) & (cols < size))


def _zero_tail(x: Tensor, cu_seqlens: Tensor) -> None:
    launch(
        _zero_tail_kernel,
        (-(-x.numel() // _BLOCK),),
        x,
        cu_seqlens,
        len(cu_seqlens) - 1,
        x.numel(),
        WIDTH=x.shape[1],
        BLOCK=_BLOCK,
        num_warps=4,
    )


def zero_tail_(x: Tensor, cu_seqlens: Tensor) -> None:
    """Set x[cu_seqlens[-1]:] to 0. No gradient flows: for use within operators.

    Args:
        x: [L, D], contiguous.
        cu_seqlens: int32 [S + 1] on the same device, contiguous.
    """
    assert x.is_contiguous() and cu_seqlens.is_contiguous(), "zero_tail_ walks through memory"
    if use_triton(x):
        _zero_tail(x, cu_seqlens)
    else:
        zero_tail_ref_(x, cu_seqlens)
