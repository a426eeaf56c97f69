"""The moving average over many tensors against PyTorch and against the reference's two passes."""

from __future__ import annotations

import pytest
import torch

from tests.ops.multi_tensor_cases import far_tensor, multi_tensor_case, rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import ema
from vjepa_fast.ops.ema import ema_, ema_ref
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.ops.triton_support.multi_tensor import CHUNK


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99925, 1.0])
def test_all_sizes_in_two_launches(kernels, momentum, half):
    sources, ours, plain = rows(0, kernels), rows(1, kernels), rows(1, kernels)
    truth = [t.double() * momentum + s.double() * (1 - momentum) for t, s in zip(ours, sources, strict=True)]
    shadows = [torch.full_like(t, torch.nan, dtype=half) for t in ours] if half else []
    ema_(ours, sources, momentum, shadows)
    ema_ref(plain, sources, momentum, [])
    assert dispatch.launches == {"_ema_kernel": 2}
    for number, triple in enumerate(zip(ours, plain, truth, strict=True)):
        assert_as_good(f"target {number}", *triple)
    for target, shadow in zip(ours, shadows, strict=False):
        assert torch.equal(shadow, target.to(half))
    for source, untouched in zip(sources, rows(0, kernels), strict=True):
        assert torch.equal(source, untouched)


def test_momentum_on_the_device(kernels):
    sources, ours, plain = rows(0, kernels), rows(1, kernels), rows(1, kernels)
    momentum = torch.tensor(0.9, dtype=torch.float64, device=kernels)
    ema_(ours, sources, momentum)
    assert dispatch.launches["_ema_kernel"] == 2
    ema_ref(plain, sources, momentum.float(), [])
    for target, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(target, expected)


def test_a_thousand_small_steps_do_not_drift(kernels):
    """At this momentum a step moves a target by less than half a unit of bfloat16."""
    target, source = [torch.ones(64, device=kernels)], [torch.zeros(64, device=kernels)]
    for _ in range(200):
        ema_(target, source, 0.99925)
    torch.testing.assert_close(target[0], torch.full_like(target[0], 0.99925**200), rtol=2e-5, atol=0)


def test_what_the_kernel_cannot_take_goes_through_pytorch(kernels):
    for cast in (lambda x: x.double(), lambda x: x.bfloat16()):
        target, source = [cast(torch.ones(5, device=kernels))], [cast(torch.zeros(5, device=kernels))]
        ema_(target, source, 0.5)
        assert torch.equal(target[0], torch.full_like(target[0], 0.5))
    other_strides = [torch.ones(4, 3, device=kernels).t()], [torch.zeros(3, 4, device=kernels)]
    ema_(*other_strides, 0.5)
    assert torch.equal(other_strides[0][0], torch.full((3, 4), 0.5, device=kernels))
    assert not dispatch.launches


def test_writes_are_seen_by_autograd(kernels):
    source = [torch.ones(4, device=kernels)]
    target = torch.ones(4, device=kernels)
    weight = torch.ones(4, device=kernels, requires_grad=True)
    product = (weight * target).sum()
    ema_([target], source, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_bad_arguments(kernels):
    x = torch.ones(3, device=kernels)
    with pytest.raises(ValueError, match="2 targets, 1 sources"):
        ema_([x, x], [x], 0.5)
    with pytest.raises(ValueError, match=r"\[3\].*\[\[2\]\]"):
        ema_([x], [x[:2]], 0.5)
    ema_([], [], 0.5)


def test_elements_beyond_two_to_the_31(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    start = 2**31
    target_address, target, _one = far_tensor(torch.ones(20), start)
    source_address, _, _two = far_tensor(torch.zeros(20), start)
    dispatch.launch(
        ema._ema_kernel,
        (1,),
        torch.tensor([[target_address, source_address, 0]]),
        torch.tensor([start + 20]),
        torch.tensor([[0, start // CHUNK]], dtype=torch.int32),
        torch.tensor(0.75).double(),
        SHADOW_FP16=False,
        ALIGNED=False,
        CHUNK=CHUNK,
        BLOCK=32,
    )
    assert (target == 0.75).all()


def test_registration(kernels):
    sources, targets = rows(0, kernels), rows(1, kernels)
    shadows = [torch.zeros_like(t, dtype=torch.bfloat16) for t in targets]
    momentum = torch.tensor(0.9, dtype=torch.float64, device=kernels)
    torch.library.opcheck(torch.ops.vjepa_fast.ema_.default, (targets, sources, momentum, shadows))
    torch.library.opcheck(torch.ops.vjepa_fast.ema_.default, (targets, sources, momentum, []))
    eager = [t.clone() for t in targets]
    ema_(eager, sources, 0.9, shadows)
    compiled = torch.compile(ema_, fullgraph=True, backend="aot_eager")
    compiled(targets, sources, 0.9, [torch.zeros_like(s) for s in shadows])
    for target, expected in zip(targets, eager, strict=True):
        assert torch.equal(target, expected)


COMPILED = {
    "ema aligned": lambda: multi_tensor_case(lambda x, half: ema._ema([x], [x], torch.zeros(()).double(), [half]), 64),
    "ema odd": lambda: multi_tensor_case(lambda x, half: ema._ema([x], [x], torch.zeros(()).double(), [half]), 63),
}
"""What tests/aot compiles."""
