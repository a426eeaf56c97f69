"""zero_tail: rows behind the last sequence are zeroed, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from vjepa_fast.ops import zero_tail as module
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.ops.zero_tail import zero_tail_, zero_tail_ref_


@pytest.mark.parametrize(("rows", "width"), [(7, 3), (131, 96), (5, 4097), (64, 64), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel(kernels: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    filled = torch.full((rows + 1, width), float("nan"), device=kernels, dtype=dtype)
    for used in sorted({0, 1, rows // 2, rows - 1, rows}):
        cu_seqlens = torch.tensor([0, used // 3, used], dtype=torch.int32, device=kernels)
        buffer = filled.clone()
        # The row behind the buffer belongs to somebody else.
        zero_tail_(buffer[:rows], cu_seqlens)
        assert buffer[:used].isnan().all() and buffer[rows].isnan().all()
        assert not buffer[used:rows].any()
        plain = filled[:rows].clone()
        zero_tail_ref_(plain, cu_seqlens)
        assert torch.equal(plain.isnan(), buffer[:rows].isnan())
    assert dispatch.launches["_zero_tail_kernel"] == len({0, 1, rows // 2, rows - 1, rows})


def test_fp64_and_no_rows() -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    zero_tail_(x, torch.tensor([0, 2], dtype=torch.int32))
    assert x.tolist() == [[1, 1], [1, 1], [0, 0]]
    zero_tail_(torch.ones(0, 2), torch.tensor([0], dtype=torch.int32))


def test_strided_memory_is_refused() -> None:
    with pytest.raises(AssertionError, match="walks through memory"):
        zero_tail_(torch.ones(4, 4)[:, :2], torch.tensor([0, 2], dtype=torch.int32))


def zero_tail_case(dtype: torch.dtype, width: int) -> None:
    module._zero_tail(torch.zeros(64, width, dtype=dtype), torch.zeros(49, dtype=torch.int32))


COMPILED = {
    "zero_tail bf16 1024": lambda: zero_tail_case(torch.bfloat16, 1024),
    "zero_tail bf16 3072": lambda: zero_tail_case(torch.bfloat16, 3072),
}
"""What tests/aot compiles."""
