"""Lists of tensors that a multi-tensor kernel must take."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.ops.triton_support.multi_tensor import CHUNK

SHAPES = [(1,), (3,), (16,), (5, 7), (33, 32), (0,), (CHUNK,), (CHUNK + 1,), (2 * CHUNK + 48,), (1009,)]
"""One element, odd, prime and empty, less than a block, whole chunks, one more than that, and a tail."""


def rows(seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A random tensor of each shape, then one that is not aligned and a transposed one."""
    g = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=g).to(device, dtype) for shape in SHAPES]
    found.append(torch.randn(65, generator=g).to(device, dtype)[1:])
    found.append(torch.randn(12, 40, generator=g).to(device, dtype).t())
    return found


def far_tensor(values: Tensor, start: int) -> tuple[int, np.ndarray, mmap.mmap]:
    """fp32 memory of which only elements start .. start + len(values) are touched.

    Returns:
        Its address, a view of the touched elements, and what keeps it alive.
    """
    assert values.dtype == torch.float32 and (start * 4) % mmap.PAGESIZE == 0
    # Python names this flag of Linux from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * (start + prod(values.shape)), flags=flags)
    everything = np.frombuffer(memory, np.float32)
    everything[start:] = values.numpy()
    return everything.ctypes.data, everything[start:], memory


def multi_tensor_case(run: Callable[[Tensor, Tensor], None], size: int) -> None:
    """For tests/aot; `size` decides whether the tensors count as aligned."""
    run(torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16))
