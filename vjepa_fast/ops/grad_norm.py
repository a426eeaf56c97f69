"""Sum of the squares of many tensors in one pass, for the norm of all gradients.

Its square root is what torch.nn.utils.get_total_norm returns. It is not finite if any element is not; a norm above
1.8e19 counts as not finite too, because its square exceeds fp32.

Bytes: 4 an element. FLOPs: 2 an element, so that memory bounds it. Each program sums one chunk, then the chunks are
summed: the same bits at every run.

Legend: N tensors, C columns of the table, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vjepa_fast.ops.triton_support.dispatch import jit, kernels_of, launch, tl, use_triton
from vjepa_fast.ops.triton_support.multi_tensor import BLOCK, CHUNK, is_dense, table_of


def sum_of_squares_ref(tensors: Sequence[Tensor]) -> Tensor:
    """The definition: a scalar in the dtype of the tensors."""
    return torch.nn.utils.get_total_norm(list(tensors)).square()


@jit
def _sum_of_squares_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr,  # int64 [N, 1]
    sizes_ptr,  # int64 [N]
    chunks_ptr,  # int32 [K, 2]
    sums_ptr,  # fp32 [K]
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program).to(tl.int64)
    first = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(sizes_ptr + tensor)
    x_ptr = tl.load(addresses_ptr + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        size = tl.multiple_of(size, 16)
        x_ptr = tl.multiple_of(x_ptr, 16)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, min(CHUNK, size - first), BLOCK):
        cols = first + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + program, tl.sum(total, 0))


torch.library.define("vjepa_fast::sum_of_squares", "(Tensor[] tensors) -> Tensor")


@torch.library.register_fake("vjepa_fast::sum_of_squares")
def _output(tensors: Sequence[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=tensors[0].device)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    table = table_of([tensors], device)
    sums = torch.empty(len(table.aligned) + len(table.others), dtype=torch.float32, device=device)
    done = 0
    for chunks, is_aligned in table.launches():
        launch(
            _sum_of_squares_kernel,
            (len(chunks),),
            table.addresses,
            table.sizes,
            chunks,
            sums[done:],
            ALIGNED=is_aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=4,
        )
        done += len(chunks)
    return sums.sum(dtype=torch.float64).float()


torch.library.impl("vjepa_fast::sum_of_squares", ("cpu", "cuda"), _sum_of_squares)
# Partial sums, then their sum.
kernels_of["sum_of_squares"] = 2


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a scalar: fp32, in plain PyTorch that of the tensors.

    Args:
        tensors: at least one, any float dtype, on one device; no gradient flows through.

    Raises:
        ValueError: no tensors.
    """
    if not tensors:
        raise ValueError("there are no tensors to take the norm of")
    # Only the set of elements counts, so that a dense tensor of any strides is read in the order of its memory.
    fits = all(t.dtype == torch.float32 and is_dense(t) for t in tensors)
    if fits and use_triton(*tensors):
        total: Tensor = torch.ops.vjepa_fast.sum_of_squares(list(tensors))
        return total
    return sum_of_squares_ref(tensors)
