"""AdamW with its moving average over many tensors, against torch's AdamW."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tests.ops.multi_tensor_cases import far_tensor, multi_tensor_case, rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import adamw_ema as module
from vjepa_fast.ops.adamw_ema import Operands, adamw_ema_, adamw_ema_ref, kernels_fit
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.ops.triton_support.multi_tensor import CHUNK

GROUPS = [(1e-3, 0.9, 0.999, 1e-8, 0.04, 0.999), (2e-2, 0.8, 0.95, 1e-6, 0.0, 0.9), (1e-4, 0.0, 0.0, 1e-3, 0.5, 0.0)]
LISTS = [field.name for field in fields(Operands) if field.name != "groups"]


def operands(device: torch.device, half: torch.dtype | None = torch.bfloat16, start: float = 0) -> Operands:
    """All sizes; of three tensors one has no target, and of five one has no gradient."""
    found = Operands()
    for number, (param, grad, target) in enumerate(zip(*(rows(seed, device) for seed in range(3)), strict=True)):
        has_grad, has_target = number % 5 != 4, number % 3 != 2
        found.params.append(param)
        found.grads.append(grad if has_grad else None)
        found.exp_avgs.append(torch.zeros_like(param) if has_grad else None)
        found.exp_avg_sqs.append(torch.zeros_like(param) if has_grad else None)
        found.steps.append(torch.full((), float(start), device=device) if has_grad else None)
        found.targets.append(target if has_target else None)
        found.shadows.append(torch.full_like(param, torch.nan, dtype=half) if half else None)
        found.target_shadows.append(torch.full_like(param, torch.nan, dtype=half) if half and has_target else None)
        found.groups.append(number % 3)
    return found


def cast(o: Operands, dtype: torch.dtype) -> Operands:
    """A copy in another precision, without half-precision copies."""

    def column(name: str) -> list[Tensor | None]:
        return [
            None if x is None or "shadows" in name else x.clone() if name == "steps" else x.to(dtype, copy=True)
            for x in getattr(o, name)
        ]

    return Operands(**{name: column(name) for name in LISTS}, groups=o.groups)  # type: ignore[arg-type]


def on_device(device: torch.device) -> Tensor:
    return torch.tensor(GROUPS, dtype=torch.float64, device=device)


def scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


def assert_close(ours: Operands, plain: Operands, truth: Operands) -> None:
    for name in LISTS[:-2]:
        for number, triple in enumerate(zip(*(getattr(o, name) for o in (ours, plain, truth)), strict=True)):
            if triple[0] is not None:
                assert_as_good(f"{name} {number}", triple[0], triple[1], triple[2].double())


def assert_shadows_are_fresh(o: Operands) -> None:
    for copies, masters in ((o.shadows, o.params), (o.target_shadows, o.targets)):
        for copy, master in zip(copies, masters, strict=True):
            if copy is not None:
                assert torch.equal(copy, master.to(copy.dtype))


@pytest.mark.parametrize("start", [0, 7, 100_000])
def test_three_steps(kernels, start):
    ours = operands(kernels, start=start)
    plain, truth = cast(ours, torch.float32), cast(ours, torch.float64)
    assert kernels_fit(ours)
    for _ in range(3):
        adamw_ema_(ours, on_device(kernels), scalar(1.0, kernels))
        for oracle in (plain, truth):
            adamw_ema_ref(oracle, GROUPS, scalar(1.0, kernels))
    assert_close(ours, plain, truth)
    assert_shadows_are_fresh(ours)
    assert dispatch.launches == {"_adamw_ema_factors_kernel": 3, "_adamw_ema_kernel": 6}
    assert {float(s) for s in ours.steps if s is not None} == {start + 3.0}


@pytest.mark.parametrize("half", [None, torch.float16])
@pytest.mark.parametrize("total", [float("nan"), float("inf")])
def test_a_skipped_step_moves_the_targets_only(kernels, half, total):
    ours = operands(kernels, half)
    adamw_ema_(ours, on_device(kernels), scalar(1.0, kernels))
    before = cast(ours, torch.float32)
    ours.grads[0].fill_(total)
    adamw_ema_(ours, on_device(kernels), scalar(total, kernels))
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for x, old in zip(getattr(ours, name), getattr(before, name), strict=True):
            assert x is None or torch.equal(x, old), name
    for target, old, param, group in zip(ours.targets, before.targets, before.params, ours.groups, strict=True):
        if target is not None:
            momentum = GROUPS[group][-1]
            torch.testing.assert_close(target, momentum * old + (1 - momentum) * param)
    assert_shadows_are_fresh(ours)
    # The first step of all may be skipped too.
    fresh = operands(kernels, half)
    adamw_ema_(fresh, on_device(kernels), scalar(total, kernels))
    assert_shadows_are_fresh(fresh)
    assert all(s is None or s == 0 for s in fresh.steps)


def test_tables_follow_their_tensors(kernels):
    """Gradients lie elsewhere at each step; other tensors may move too."""
    ours = operands(kernels)
    truth = cast(ours, torch.float64)
    for _ in range(2):
        ours.grads = [None if g is None else g.clone(memory_format=torch.preserve_format) * 0.5 for g in ours.grads]
        truth.grads = [None if g is None else g.double() for g in ours.grads]
        ours.exp_avgs = [None if x is None else x.clone(memory_format=torch.preserve_format) for x in ours.exp_avgs]
        adamw_ema_(ours, on_device(kernels), scalar(1.0, kernels))
        adamw_ema_ref(truth, GROUPS, scalar(1.0, kernels))
    assert_close(ours, cast(truth, torch.float32), truth)


def test_more_tensors_than_a_program_of_factors_takes(kernels):
    params = [torch.full((16,), float(i), device=kernels) for i in range(70)]
    o = Operands(
        params,
        [torch.ones_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros((), device=kernels) for _ in params],
        [None] * 70,
        [None] * 70,
        [None] * 70,
        [0] * 70,
    )
    adamw_ema_(
        o, torch.tensor([[0.5, 0.9, 0.999, 1e-12, 0.0, 0.0]], dtype=torch.float64, device=kernels), scalar(1.0, kernels)
    )
    # The first step of Adam is the learning rate times the sign.
    for number, param in enumerate(o.params):
        torch.testing.assert_close(param, torch.full_like(param, number - 0.5))


def test_what_the_kernels_do_not_serve(kernels):
    for change in ({"params": torch.float64}, {"grads": torch.bfloat16}, {"exp_avgs": torch.float64}):
        o = operands(kernels)
        for name, dtype in change.items():
            getattr(o, name)[1] = getattr(o, name)[1].to(dtype)
        assert not kernels_fit(o)
    o = operands(kernels)
    o.grads[3] = o.grads[3].t().contiguous().t()
    assert not kernels_fit(o)
    o = operands(kernels)
    # Vectors of any length have equal strides.
    o.exp_avgs[0] = torch.zeros(5, device=kernels)
    assert not kernels_fit(o)
    assert not kernels_fit(Operands())


def test_elements_beyond_two_to_the_31(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    start, values = 2**31, torch.arange(1.0, 21.0)
    made = [far_tensor(x, start) for x in (values, values, torch.zeros(20), torch.zeros(20), torch.zeros(20))]
    step = torch.zeros(())
    row = torch.tensor([[*(address for address, _, _ in made), 0, 0, step.data_ptr()]])
    factors = torch.full((1, 8), torch.nan)
    dispatch.launch(
        module._adamw_ema_factors_kernel,
        (1,),
        row,
        torch.tensor([0]),
        on_device(kernels)[1:2],
        torch.tensor(1.0),
        factors,
        1,
        BLOCK=16,
    )
    dispatch.launch(
        module._adamw_ema_kernel,
        (1,),
        row,
        torch.tensor([start + 20]),
        torch.tensor([[0, start // CHUNK]], dtype=torch.int32),
        factors,
        torch.tensor(1.0),
        SHADOW_FP16=False,
        ALIGNED=False,
        CHUNK=CHUNK,
        BLOCK=32,
    )
    plain = Operands(
        [values.clone()],
        [values],
        [torch.zeros(20)],
        [torch.zeros(20)],
        [torch.zeros(())],
        [torch.zeros(20)],
        [None],
        [None],
        [0],
    )
    adamw_ema_ref(plain, GROUPS[1:2], torch.tensor(1.0))
    for (_, found, _), expected in zip(
        made, [plain.params, plain.grads, plain.exp_avgs, plain.exp_avg_sqs, plain.targets], strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(found.copy()), expected[0])


def test_registration(kernels):
    o = operands(kernels)

    def arguments() -> list[object]:
        # Absent tensors must not be one and the same here, as the check writes to all of them.
        lists = [
            [
                torch.zeros(0, device=kernels) if x is None else x.clone(memory_format=torch.preserve_format)
                for x in getattr(o, name)
            ]
            for name in LISTS
        ]
        return [*lists, o.groups, on_device(kernels), scalar(1.0, kernels)]

    operator = torch.ops.vjepa_fast.adamw_ema_.default
    torch.library.opcheck(operator, arguments())
    eager, ours = arguments(), arguments()
    operator(*eager)
    torch.compile(lambda args: operator(*args), fullgraph=True, backend="aot_eager")(ours)
    for mine, expected in zip(ours[:-3], eager[:-3], strict=True):
        for x, y in zip(mine, expected, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


def adamw_ema_case(x: torch.Tensor, half: torch.Tensor) -> None:
    one = torch.zeros(())
    module._adamw_ema([x], [x], [x], [x], [one], [x], [half], [half], [0], torch.zeros(1, 6).double(), one)


COMPILED = {
    "adamw_ema aligned": lambda: multi_tensor_case(adamw_ema_case, 64),
    "adamw_ema odd": lambda: multi_tensor_case(adamw_ema_case, 63),
}
"""What tests/aot compiles."""
