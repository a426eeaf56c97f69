"""One kernel over many tensors: a table of their addresses, and a list of the chunks that its programs take.

A table is made anew only when an address or a size changes. That is so at every step for gradients that autograd
allocates, so it is written from pinned memory and nothing waits: 8 bytes for each tensor and column.

Loads of 16 bytes need addresses that are multiples of 16 bytes and sizes that are multiples of 16 elements. Tensors
that are not so, if there are any, get a launch of their own.

Legend: N tensors, C columns (operands), K chunks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.ops.triton_support.dispatch import is_capturing

CHUNK = 8192
"""Elements of one program."""

BLOCK = 1024
"""Elements that a program holds in registers."""

_ALIGNMENT = 16
_NUM_KEPT = 8


@dataclass(frozen=True)
class Table:
    """Device tensors that tell a kernel where its operands are."""

    addresses: Tensor
    """int64 [N, C]; 0 where there is no such operand."""
    sizes: Tensor
    """int64 [N], elements."""
    aligned: Tensor
    """int32 [K, 2]: number of the tensor, number of the chunk within it."""
    others: Tensor
    """Chunks of the tensors that are not aligned, as `aligned`."""
    integers: tuple[Tensor, ...]
    """int64 [N] each, as given."""
    sources: tuple[Tensor, ...]
    """Pinned memory that a captured graph copies from again at each replay."""

    def launches(self) -> Iterator[tuple[Tensor, bool]]:
        """The chunks of each launch, and whether their tensors are aligned."""
        for chunks, is_aligned in ((self.aligned, True), (self.others, False)):
            if len(chunks):
                yield chunks, is_aligned


def is_dense(x: Tensor) -> bool:
    """Whether the elements lie without gaps and without overlap, in any order of the dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


_tables: OrderedDict[tuple[int, ...], Table] = OrderedDict()
_captured: list[Table] = []


def _to_device(values: np.ndarray, device: torch.device, sources: list[Tensor]) -> Tensor:
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    sources.append(host.pin_memory())
    return sources[-1].to(device, non_blocking=True)


def _chunks(sizes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    counts = np.where(chosen, -(-sizes // CHUNK), 0)
    tensors = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.stack([tensors, within], 1).astype(np.int32)


def table_of(
    columns: Sequence[Sequence[Tensor | None]],
    device: torch.device,
    scalars: Sequence[Sequence[Tensor | None]] = (),
    integers: Sequence[Sequence[int]] = (),
) -> Table:
    """The table of these operands.

    Args:
        columns: lists of N dense tensors; those of a row have one size, and the first list holds no None. None stands
            for an operand that a row lacks.
        device: of all tensors.
        scalars: further columns, of tensors with one element.
        integers: lists of N numbers that the kernel wants on the device too.
    """
    sizes = [t.numel() for t in columns[0] if t is not None]
    assert len(sizes) == len(columns[0])
    everything = [*columns, *scalars]
    addresses = [0 if t is None or not t.numel() else t.data_ptr() for column in everything for t in column]
    key = (hash(str(device)), len(sizes), *sizes, *addresses, *(n for column in integers for n in column))
    capturing = is_capturing(device)
    if key in _tables and not capturing:
        _tables.move_to_end(key)
        return _tables[key]
    rows = np.array(addresses, np.int64).reshape(len(everything), len(sizes)).T.copy()
    numbers = np.array(sizes, np.int64)
    aligned = (numbers % _ALIGNMENT == 0) & (rows[:, : len(columns)] % _ALIGNMENT == 0).all(1)
    sources: list[Tensor] = []
    rows_there, sizes_there, aligned_there, others_there, *integers_there = (
        _to_device(values, device, sources)
        for values in (
            rows,
            numbers,
            _chunks(numbers, aligned),
            _chunks(numbers, ~aligned),
            *(np.array(column, np.int64) for column in integers),
        )
    )
    table = Table(rows_there, sizes_there, aligned_there, others_there, tuple(integers_there), tuple(sources))
    if capturing:
        # The replays read this memory, however long they come after, so it stays until the process ends.
        _captured.append(table)
        return table
    _tables[key] = table
    if len(_tables) > _NUM_KEPT:
        _tables.popitem(last=False)
    return table
