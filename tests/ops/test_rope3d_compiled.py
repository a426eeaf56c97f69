"""Rotary positions on a CPU: the C++ operator against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.rope3d_operands import GRID, STYLES, operands
from tests.ops.tolerance import assert_as_good
from vjepa_fast.common import extension
from vjepa_fast.ops.rope3d import Rope, rope3d


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ operator serves CPU tensors."""
    if extension.load().path is None:
        pytest.skip(f"no extension: {extension.load().reason}")
    monkeypatch.delenv("VJEPA_FAST_OPS", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "count, num_heads, head_dim",
    [(7, 12, 32), (700, 2, 64), (3, 3, 80), (2, 1, 88), (13, 1, 6), (5, 3, 17), (0, 2, 32)],
)
def test_compiled_operator(compiled, monkeypatch, count, num_heads, head_dim, style, dtype):
    qkv, grad, ids = operands(count, num_heads, head_dim, dtype, torch.device("cpu"))

    def run(choice: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        monkeypatch.setenv("VJEPA_FAST_OPS", choice)
        leaf = qkv.to(dtype).requires_grad_()
        rope = Rope(ids.long(), GRID, head_dim, dtype, style)
        assert rope.compiled == (choice == "")
        # Rows that are strided, and a gradient that is transposed.
        wide = torch.cat([leaf * 1, leaf.detach()], dim=1)[:, : leaf.shape[1]]
        out = rope(wide, num_heads)
        assert out.data_ptr() == wide.data_ptr()
        return out, torch.autograd.grad(out, leaf, grad.to(dtype).t().contiguous().t())[0]

    results = run("", dtype), run("ref", dtype), run("ref", torch.float64)
    for name, *triple in zip(("qkv", "grad"), *results, strict=True):
        assert_as_good(name, *triple)


def test_compiled_operator_leaves_the_rest(compiled):
    qkv, _, ids = operands(5, 3, 64, torch.float32, torch.device("cpu"))
    heads = qkv.view(5, 3, 3, 64)
    heads[:, 2], heads[:, :2, :, 60:] = torch.inf, -torch.inf
    for given in (qkv.clone(), qkv.clone().requires_grad_()):
        out = rope3d(given * 1, ids, GRID, 3)
        back = torch.autograd.grad(out, given, qkv)[0] if given.requires_grad else out
        for new in (out.detach().view(5, 3, 3, 64), back.view(5, 3, 3, 64)):
            assert torch.equal(new[:, 2], heads[:, 2]) and torch.equal(new[:, :2, :, 60:], heads[:, :2, :, 60:])
            assert new[:, :2, :, :60].isfinite().all()


@pytest.mark.parametrize("ids", [[0, 72], [-1, 3]])
def test_compiled_operator_refuses_ids_off_the_grid(compiled, ids):
    with pytest.raises(RuntimeError, match="not on the grid of 6 x 3 x 4"):
        rope3d(torch.zeros(2, 96), torch.tensor(ids), GRID, 1)


def test_compiled_operator_refuses_bad_operands(compiled):
    rope = Rope(torch.arange(4), GRID, 32, torch.float32)
    x, ids, cos, sin = torch.zeros(4, 96), rope.ids, rope.tables[0], rope.tables[1]
    rotate = torch.ops.vjepa_fast.rope3d_rotate
    rotate(x, x, ids, cos, sin, GRID, 1)
    cases = [
        ((x.half(), x, ids, cos, sin, GRID, 1), "Half"),
        ((x, x.double(), ids, cos, sin, GRID, 1), "y has dtype"),
        ((x, x[:3], ids, cos, sin, GRID, 1), "y is not"),
        ((x, x, ids.long(), cos, sin, GRID, 1), "ids"),
        ((x, x, ids[:3], cos, sin, GRID, 1), "ids"),
        ((x, x, ids, cos[:5], sin, GRID, 1), "cos is not"),
        ((x, x, ids, cos, sin[:, :8], GRID, 1), "sin is not"),
        ((x, x, ids, cos, sin, (6, 3), 1), "grid has 2"),
        ((x, x, ids, cos, sin, GRID, 5), "H = 5"),
        ((x, x, ids, cos, sin, GRID, 0), "H = 0"),
        ((x, x, ids, cos, sin, (6, 0, 4), 1), "side of grid"),
        ((x, x, ids, cos, sin, GRID, 32), "cos has 10 columns"),
        ((x.t().contiguous().t(), x, ids, cos, sin, GRID, 1), "x has rows"),
        ((x, x, ids, cos.t().contiguous().t(), sin, GRID, 1), "cos has rows"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            rotate(*arguments)


def test_what_is_traced_holds_operators_of_torch_only(compiled):
    class Rotates(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rope3d(x * 1, torch.arange(4), GRID, 1)

    x = torch.randn(4, 96)
    exported = torch.export.export(Rotates(), (x,))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names and not [name for name in names if "vjepa_fast" in name]
    torch.testing.assert_close(exported.module()(x), Rotates()(x))
