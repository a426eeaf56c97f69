"""The sum of squares over many tensors against PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.ops.multi_tensor_cases import far_tensor, multi_tensor_case, rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import grad_norm
from vjepa_fast.ops.grad_norm import sum_of_squares, sum_of_squares_ref
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.ops.triton_support.multi_tensor import CHUNK


def test_all_sizes_in_two_launches(kernels):
    tensors = rows(0, kernels)
    truth = sum((x.double().square().sum() for x in tensors), torch.zeros((), dtype=torch.float64, device=kernels))
    assert_as_good("sum", sum_of_squares(tensors), sum_of_squares_ref(tensors), truth)
    # Aligned tensors, then the others.
    assert dispatch.launches == {"_sum_of_squares_kernel": 2}
    assert torch.equal(sum_of_squares(tensors), sum_of_squares(tensors))
    # The elements count, not where they were.
    moved = [x.clone() for x in tensors]
    torch.testing.assert_close(sum_of_squares(moved), sum_of_squares(tensors))


@pytest.mark.parametrize("place", [0, 5, CHUNK, 2 * CHUNK + 46])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_any_element_that_is_not_finite_shows(kernels, place, value):
    tensors = [torch.ones(3, device=kernels), torch.ones(2 * CHUNK + 47, device=kernels)]
    assert sum_of_squares(tensors).isfinite()
    tensors[1][place] = value
    assert not sum_of_squares(tensors).isfinite()


def test_no_elements_and_no_tensors(kernels):
    assert sum_of_squares([torch.zeros(0, device=kernels)]) == 0
    assert not dispatch.launches
    with pytest.raises(ValueError, match="no tensors"):
        sum_of_squares([])


def test_gaps_between_elements_are_not_counted(kernels):
    spread = torch.full((4, 6), torch.nan, device=kernels)
    spread[:, :3] = 2
    assert sum_of_squares([spread[:, :3]]) == 4 * 12


def test_other_dtypes_take_pytorch(kernels):
    assert sum_of_squares([torch.full((3,), 2.0, dtype=torch.float64, device=kernels)]).dtype == torch.float64
    assert sum_of_squares([torch.full((3,), 2.0, dtype=torch.bfloat16, device=kernels)]).dtype == torch.bfloat16
    assert not dispatch.launches


def test_elements_beyond_two_to_the_31(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    start = 2**31
    address, _, _memory = far_tensor(torch.arange(20, dtype=torch.float32), start)
    sums = torch.full((1,), torch.nan)
    dispatch.launch(
        grad_norm._sum_of_squares_kernel,
        (1,),
        torch.tensor([[address]]),
        torch.tensor([start + 20]),
        torch.tensor([[0, start // CHUNK]], dtype=torch.int32),
        sums,
        ALIGNED=False,
        CHUNK=CHUNK,
        BLOCK=32,
    )
    assert sums.item() == sum(i * i for i in range(20))


def test_registration(kernels):
    tensors = rows(1, kernels)
    torch.library.opcheck(torch.ops.vjepa_fast.sum_of_squares.default, (tensors,))
    compiled = torch.compile(lambda ts: sum_of_squares([t * 2 for t in ts]) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), sum_of_squares(tensors) * 4 + 1)


COMPILED = {
    "sum_of_squares aligned": lambda: multi_tensor_case(lambda x, _: grad_norm._sum_of_squares([x]), 64),
    "sum_of_squares odd": lambda: multi_tensor_case(lambda x, _: grad_norm._sum_of_squares([x]), 63),
}
"""What tests/aot compiles."""
