"""Packing: sequences of different lengths in one token buffer.

Legend: L total tokens of all sequences, S sequences, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Sequences packed back to back, with their lengths known to the host.

    A buffer may have more rows than its sequences have tokens; what lies behind the last sequence belongs to nobody.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    """int32 [S + 1] on the device of the tokens."""
    dynamic: bool = False
    """The host knows upper bounds only: a replayed CUDA graph finds other numbers in cu_seqlens than it was captured
    with, which count; `lengths` are then at least as large."""
    # Worked out here and not when asked for, as a property that keeps its value breaks a compiled graph in two.
    total: int = field(init=False)
    """Tokens of all sequences."""
    max_seqlen: int = field(init=False)
    """Longest sequence, a python int so that nothing waits for the device."""
    runs: tuple[tuple[int, int], ...] = field(init=False)
    """Maximal runs of neighbours of one length: (number of sequences, length)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.lengths))
        object.__setattr__(self, "max_seqlen", max(self.lengths, default=0))
        runs = tuple((len(list(run)), length) for length, run in groupby(self.lengths))
        object.__setattr__(self, "runs", runs)

    @classmethod
    def uniform(cls, num_sequences: int, length: int, device: torch.device) -> Packing:
        """All sequences of one length: the same layout as a dense [S, length, D] tensor."""
        cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
        return cls((length,) * num_sequences, cu_seqlens)


def sequence_of_rows(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """int64 [num_rows]: to which sequence each row of a buffer belongs; S, their number, behind the last one.

    Worked out on the device, and of a shape that does not depend on the lengths.

    Args:
        cu_seqlens: int32 [S + 1].
        num_rows: at least the last of them.
    """
    rows = torch.arange(num_rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def concatenate(parts: Sequence[Packing]) -> Packing:
    """The packing of several buffers put one after another."""
    if len(parts) == 1:
        return parts[0]
    offsets = [0]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + part.total)
    starts = [part.cu_seqlens[:-1] + offset for part, offset in zip(parts, offsets, strict=True)]
    end = parts[-1].cu_seqlens[-1:] + offsets[-1]
    return Packing(tuple(n for part in parts for n in part.lengths), torch.cat([*starts, end]))


class _PermuteRows(torch.autograd.Function):
    """x[order] where order is a permutation: the backward is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows of x in another order.

    Args:
        x: [L, D].
        order: int64 [L], a permutation: row i of the result is row order[i] of x.
        inverse: int64 [L], the inverse permutation.
    """
    return _PermuteRows.apply(x, order, inverse)
