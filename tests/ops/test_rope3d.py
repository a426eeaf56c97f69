"""Rotary positions: PyTorch against a plain reading of their definition, the kernels against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.conftest import FAR, far_rows
from tests.ops.rope3d_operands import GRID, HALVES, STYLES, operands
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import rope3d as module
from vjepa_fast.ops.rope3d import Rope, axis_width, join_ids, rope3d, rope_tables, token_positions
from vjepa_fast.ops.triton_support import dispatch

HEAD_DIMS = [32, 64, 80, 88, 96, 104]


def naive(x, position, style):
    """One head vector, one token; None for an axis that is not to be rotated."""
    out = x.clone()
    d = axis_width(len(x))
    for axis in range(3):
        for j in range(d // 2) if position[axis] is not None else ():
            a, b = x[axis * d + 2 * j], x[axis * d + 2 * j + 1]
            indices = (j, j) if style == "interleaved" else ((2 * j) % (d // 2), (2 * j + 1) % (d // 2))
            angle_a, angle_b = (position[axis] * torch.tensor(10000.0).double() ** (-2 * i / d) for i in indices)
            out[axis * d + 2 * j] = a * torch.cos(angle_a) - b * torch.sin(angle_a)
            out[axis * d + 2 * j + 1] = b * torch.cos(angle_b) + a * torch.sin(angle_b)
    return out


def check_definition(qkv, out, positions, num_heads, style):
    shape = (len(qkv), 3, num_heads, -1)
    for token, position in enumerate(positions):
        for part in range(3):
            for head in range(num_heads):
                x = qkv.view(shape)[token, part, head]
                expected = x if part == 2 else naive(x, position, style)
                torch.testing.assert_close(out.view(shape)[token, part, head], expected)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_its_definition(style, head_dim):
    torch.manual_seed(0)
    ids = torch.tensor([0, 5, 63, 17])
    positions = token_positions(ids, 3, 4)
    assert positions.tolist() == [[i // 12, i % 12 // 4, i % 4] for i in ids.tolist()]
    qkv = torch.randn(4, 3 * 2 * head_dim, dtype=torch.float64)
    check_definition(qkv, rope3d(qkv.clone(), ids, GRID, 2, style), positions.tolist(), 2, style)


@pytest.mark.parametrize("style", STYLES)
def test_positions_of_another_grid(style):
    """V-JEPA 2.1 trained on 16 x 16 tokens, seen here on 24 x 20; a grid snapped as in the action-conditioned one."""
    ids = torch.tensor([3 * 480 + 23 * 20 + 19, 7, 480 + 33])
    where = [(3, 23, 19), (0, 0, 7), (1, 1, 13)]
    for factors in ((1.0, 15 / 23, 15 / 19), (1.0, 16 / 24, 16 / 20), (0.5, 1.0, 3.0)):
        qkv = torch.randn(3, 3 * 32, dtype=torch.float64)
        positions = [[p * f for p, f in zip(place, factors, strict=True)] for place in where]
        out = rope3d(qkv.clone(), ids, (4, 24, 20), 1, style, scale=factors)
        check_definition(qkv, out, positions, 1, style)


@pytest.mark.parametrize("style", STYLES)
def test_an_action_token_takes_the_first_id_of_its_frame(style):
    qkv = torch.randn(3, 3 * 80, dtype=torch.float64)
    ids = torch.tensor([0, 2 * 12, 5 * 12])
    out = rope3d(qkv.clone(), ids, GRID, 1, style, scale=(1.0, 0.7, 0.7))
    check_definition(qkv, out, [(0, None, None), (2, None, None), (5, None, None)], 1, style)


@pytest.mark.parametrize("style", STYLES)
def test_gradient(style):
    torch.manual_seed(0)
    qkv = torch.randn(5, 3 * 2 * 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope3d(x * 1, torch.arange(5) * 3, (3, 2, 3), 2, style), qkv)


def test_interleaved_scores_depend_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, dtype=torch.float64)

    def score(at_q, at_k):
        ids = torch.tensor([(t * 6 + y) * 6 + x for t, y, x in (at_q, at_k)])
        qkv = torch.stack([torch.cat([q, q, q]), torch.cat([k, k, k])])
        out = rope3d(qkv, ids, (6, 6, 6), 1, "interleaved").view(2, 3, 64)
        return out[0, 0] @ out[1, 1]

    torch.testing.assert_close(score([1, 2, 3], [4, 2, 0]), score([2, 5, 4], [5, 5, 1]))


def test_half_precision_is_within_one_unit_of_the_exact_result():
    torch.manual_seed(0)
    qkv = torch.randn(50, 3 * 64).bfloat16()
    exact = rope3d(qkv.double(), torch.arange(50), (2, 5, 5), 1)
    ours = rope3d(qkv, torch.arange(50), (2, 5, 5), 1)
    torch.testing.assert_close(ours, exact.bfloat16(), atol=0, rtol=2**-7)


def rounded(x: Tensor, positions: Tensor) -> Tensor:
    """One axis of the tiled form as the reference computes it under autocast, each line in the dtype of x: the power
    alone is on autocast's list of fp32 operations."""
    half = x.shape[-1] // 2
    omega = torch.arange(half, dtype=x.dtype)
    omega = (1.0 / 10000 ** (omega / half).float()).to(x.dtype)
    angles = positions[:, None].to(x.dtype) * omega
    sin, cos = angles.sin().repeat(1, 2), angles.cos().repeat(1, 2)
    turned = torch.empty_like(x)
    turned[:, ::2], turned[:, 1::2] = -x[:, 1::2], x[:, ::2]
    return x * cos + turned * sin


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_precision_of_the_reference(dtype, head_dim):
    torch.manual_seed(0)
    grid, d = (4, 24, 24), axis_width(head_dim)
    ids = torch.randperm(4 * 24 * 24)[:200]
    qkv, grad = torch.randn(2, 200, 3 * head_dim).to(dtype).requires_grad_()
    positions = token_positions(ids, *grid[1:])
    q = qkv[:, :head_dim]
    parts = [rounded(q[:, a * d : a * d + d], positions[:, a]) for a in range(3)]
    expected = torch.cat([*parts, q[:, 3 * d :]], dim=1)
    out = rope3d(qkv * 1, ids, grid, 1, "tiled", "reference")
    exact = {"atol": 0, "rtol": 0} if dtype in HALVES else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(out[:, :head_dim], expected, **exact)
    (ours,) = torch.autograd.grad(out[:, :head_dim], qkv, grad[:, :head_dim], retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, qkv, grad[:, :head_dim])
    torch.testing.assert_close(ours[:, :head_dim], theirs[:, :head_dim], **exact)
    if dtype in HALVES:
        assert not torch.equal(out, rope3d(qkv * 1, ids, grid, 1, "tiled", "fp32"))


def test_tables_need_no_values_from_the_host():
    """On a GPU a tensor made of numbers is a copy that waits."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    ids = torch.arange(12)
    with Record():
        rope3d(torch.randn(12, 96), ids, GRID, 1, "tiled", "reference", (1.0, 0.5, 0.5))
    assert "aten::arange" in names
    assert not {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"} & set(names)


def test_ids_of_several_grids():
    ids, grid = join_ids([torch.tensor([0, 7, 23]), torch.tensor([5], dtype=torch.int32)], [(4, 2, 3), (2, 3, 2)])
    assert grid == (4, 3, 3)
    expected = torch.cat([token_positions(torch.tensor([0, 7, 23]), 2, 3), token_positions(torch.tensor([5]), 3, 2)])
    assert torch.equal(token_positions(ids, 3, 3), expected)
    same, grid = join_ids([torch.tensor([3], dtype=torch.int32)] * 2, [(4, 2, 3), (2, 2, 3)])
    assert same.tolist() == [3, 3] and same.dtype == torch.int32 and grid == (4, 2, 3)


def check(qkv: Tensor, grad: Tensor, ids: Tensor, num_heads: int, **options) -> None:
    """Rotated buffer and its gradient by kernel, by PyTorch, and in fp64."""

    def run(choice: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VJEPA_FAST_OPS", choice)
            leaf = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
            out = rope3d(leaf + 0, ids, GRID, num_heads, **options)
            return out, torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]

    results = run("triton"), run("ref"), run("ref", torch.float64)
    for name, *triple in zip(("qkv", "grad"), *results, strict=True):
        assert_as_good(name, *triple)
        if options.get("precision") == "reference" and qkv.dtype in HALVES:
            assert torch.equal(triple[0], triple[1]), f"{name}: rounded elsewhere"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "count, num_heads, head_dim",
    [(7, 12, 32), (5, 16, 64), (3, 3, 80), (2, 22, 88), (1, 2, 96), (3, 1, 104), (13, 1, 6), (5, 3, 17)],
)
def test_kernels(kernels, count, num_heads, head_dim, style, dtype):
    qkv, grad, ids = operands(count, num_heads, head_dim, dtype, kernels)
    for precision in ("fp32", "reference"):
        dispatch.launches.clear()
        check(qkv, grad, ids, num_heads, style=style, precision=precision)
        assert dispatch.launches == {"_rope3d_kernel": 2}


def test_kernels_with_scale_and_wide_ids(kernels):
    qkv, grad, ids = operands(7, 2, 32, torch.float32, kernels)
    check(qkv, grad, ids.long(), 2, scale=(0.5, 15 / 23, 15 / 19))
    check(qkv, grad, ids.repeat_interleave(2)[::2], 2)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_values_and_left_over_elements_are_as_before(kernels):
    for dtype in (torch.float32, *HALVES):
        qkv, grad, ids = operands(5, 3, 64, dtype, kernels)
        for x in (qkv, grad):
            heads = x.view(5, 3, 3, 64)
            heads[:, 2], heads[:, :2, :, 60:] = torch.inf, -torch.inf
            heads[:, :2, :, 61], heads[:, 2, :, 5] = -0.0, -0.0
        leaf = qkv.clone().requires_grad_()
        buffer = leaf * 1
        out = rope3d(buffer, ids, GRID, 3)
        assert out.data_ptr() == buffer.data_ptr()
        incoming = grad.clone()
        (back,) = torch.autograd.grad(out, leaf, incoming)
        assert torch.equal(incoming, grad)
        for new, old in ((out, qkv), (back, grad)):
            new, old = new.detach().view(5, 3, 3, 64), old.view(5, 3, 3, 64)
            assert torch.equal(new[:, 2], old[:, 2]) and torch.equal(new[:, :2, :, 60:], old[:, :2, :, 60:])
            assert torch.equal(new[:, :2, :, 61].signbit(), old[:, :2, :, 61].signbit())
            assert new[:, :2, :, :60].isfinite().all()


@pytest.mark.parametrize("choice", ["triton", "ref"])
def test_empty(kernels, choice, monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_OPS", choice)
    leaf = torch.zeros(0, 96, device=kernels, requires_grad=True)
    out = rope3d(leaf + 0, torch.zeros(0, dtype=torch.int32, device=kernels), GRID, 1)
    out.sum().backward()
    assert out.shape == (0, 96) and leaf.grad is not None and not dispatch.launches


def test_strided_rows_and_gradients_of_any_layout(kernels):
    qkv, grad, ids = operands(5, 2, 32, torch.float32, kernels)
    expected = rope3d(qkv.clone(), ids, GRID, 2)
    wide = torch.full((5, 600), 7.0, device=kernels)
    wide[:, 100:292] = qkv
    assert torch.equal(rope3d(wide[:, 100:292], ids, GRID, 2), expected)
    assert torch.equal(wide[:, 100:292], expected)
    assert (wide[:, :100] == 7).all() and (wide[:, 292:] == 7).all()
    layouts = [
        torch.cat([grad, grad], 1)[:, :192],
        grad.t().contiguous().t(),
        grad[:1].expand(5, 192),
        grad.mean().expand(5, 192),
    ]
    for incoming in layouts:
        check(qkv, incoming, ids, 2)


def test_rows_beyond_two_to_the_31_elements(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    qkv, _, ids = operands(3, 2, 32, torch.float32, kernels)
    expected = rope3d(qkv.clone(), ids, GRID, 2)
    tables = rope_tables(GRID, 32, torch.float32, "tiled", "fp32", (1.0, 1.0, 1.0), kernels)

    def run(x: Tensor, y: Tensor, x_stride: int, y_stride: int, num_turned: int) -> None:
        dispatch.launch(
            module._rope3d_kernel,
            (2,),
            x,
            y,
            ids,
            tables[0],
            tables[1],
            x_stride,
            y_stride,
            3,
            *GRID,
            6,
            num_turned,
            HEAD_DIM=32,
            AXIS=10,
            ROUND=False,
            TOKENS=2,
            ROWS=8,
            COLS=32,
        )

    far, near = far_rows(qkv), torch.zeros(3, 192)
    run(far, near, FAR, 192, 4)
    torch.testing.assert_close(near, expected)
    # In place, then read back by a launch that turns nothing.
    run(far, far, FAR, FAR, 4)
    run(far, near.zero_(), FAR, 192, 0)
    torch.testing.assert_close(near, expected)


@pytest.mark.parametrize("precision", ["fp32", "reference"])
def test_opcheck(kernels, precision):
    qkv, grad, ids = operands(5, 2, 32, torch.bfloat16, kernels)
    rope = Rope(ids, GRID, 32, torch.bfloat16, "tiled", precision)
    wide = torch.zeros(5, 400, dtype=torch.bfloat16, device=kernels)
    for x in (qkv, wide[:, :192]):
        torch.library.opcheck(
            torch.ops.vjepa_fast.rope3d_fwd.default, (x, ids, rope.tables[0], rope.tables[1], GRID, 2, rope.rounds)
        )
    for x in (grad, grad.t().contiguous().t(), wide[:, 8:200]):
        torch.library.opcheck(
            torch.ops.vjepa_fast.rope3d_bwd.default, (x, ids, rope.tables[0], rope.tables[2], GRID, 2, rope.rounds)
        )


def test_compiles_whole(kernels):
    x, _, ids = operands(5, 2, 32, torch.bfloat16, kernels)
    x.requires_grad_()

    def used(x: Tensor) -> Tensor:
        rope = Rope(ids, GRID, 32, torch.bfloat16)
        first = rope(x * 2, 2)
        # A copy of something that is needed again.
        second = rope(first.clone(), 2)
        return (first.sin() + second.cos()).float().square().sum()

    eager = used(x)
    (eager_grad,) = torch.autograd.grad(eager, x)
    compiled = torch.compile(used, fullgraph=True, backend="aot_eager")(x)
    (compiled_grad,) = torch.autograd.grad(compiled, x)
    assert torch.equal(eager, compiled) and torch.equal(eager_grad, compiled_grad)
    assert dispatch.launches == {"_rope3d_kernel": 8}


@pytest.mark.parametrize(
    "qkv, message",
    [
        (torch.ones(3, 96), "expected \\[4, 96\\]"),
        (torch.ones(4, 95), "shape \\[4, 95\\]"),
        (torch.ones(4, 96).half(), "torch.float16; expected"),
        (torch.ones(96, 4).t(), "strides \\(1, 4\\)"),
    ],
)
def test_bad_operands(qkv, message):
    with pytest.raises(ValueError, match=message):
        Rope(torch.arange(4), GRID, 32, torch.float32)(qkv, 1)


def rope3d_case(dtype: torch.dtype, num_heads: int, head_dim: int, precision: module.Precision, back: bool) -> None:
    grid = (8, 16, 16)
    rope = Rope(torch.zeros(64, dtype=torch.int32), grid, head_dim, dtype, "tiled", precision)
    qkv = torch.zeros(64, 3 * num_heads * head_dim, dtype=dtype)
    run = module._rope3d_bwd if back else module._rope3d_fwd
    run(qkv, rope.ids, rope.tables[0], rope.tables[2 if back else 1], grid, num_heads, rope.rounds)


COMPILED = {
    "rope3d bf16 16 x 64": lambda: rope3d_case(torch.bfloat16, 16, 64, "fp32", False),
    "rope3d bf16 16 x 64 backward": lambda: rope3d_case(torch.bfloat16, 16, 64, "fp32", True),
    "rope3d bf16 16 x 64 reference": lambda: rope3d_case(torch.bfloat16, 16, 64, "reference", False),
    "rope3d bf16 16 x 80": lambda: rope3d_case(torch.bfloat16, 16, 80, "fp32", False),
    "rope3d bf16 16 x 88 backward": lambda: rope3d_case(torch.bfloat16, 16, 88, "fp32", True),
    "rope3d bf16 12 x 32": lambda: rope3d_case(torch.bfloat16, 12, 32, "fp32", False),
    "rope3d fp32 3 x 104": lambda: rope3d_case(torch.float32, 3, 104, "fp32", False),
}
"""What tests/aot compiles."""
