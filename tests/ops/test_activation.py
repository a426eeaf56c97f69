"""The GELU and SwiGLU kernels against PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.conftest import FAR, far_rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.models.layers import MLP, SwiGLU
from vjepa_fast.ops import activation as module
from vjepa_fast.ops.activation import gelu, swiglu
from vjepa_fast.ops.triton_support import dispatch

SHAPES = [(1,), (16,), (1, 1024), (13, 31), (3, 1409), (2, 3, 257), (4, 1536)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GELU = {"_gelu_fwd_kernel": 1, "_gelu_bwd_kernel": 1}
SWIGLU = {"_swiglu_fwd_kernel": 1, "_swiglu_bwd_kernel": 1}


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, num: int) -> list[Tensor]:
    """Beyond +-4 on purpose, where GELU and silu flatten out."""
    g = torch.Generator().manual_seed(sum(shape))
    return [(2.5 * torch.randn(shape, generator=g)).to(device, dtype) for _ in range(num)]


def check(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    """Value and every gradient by kernel, by PyTorch, and in fp64."""

    def run(choice: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        # Strides are part of the case.
        leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VJEPA_FAST_OPS", choice)
            out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    names = ["y", "dx", "dvalue"][: 1 + len(inputs)]
    for name, *triple in zip(names, run("triton"), run("ref"), run("ref", torch.float64), strict=True):
        assert_as_good(name, *triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(kernels, shape, dtype):
    x, grad = operands(shape, dtype, kernels, 2)
    check(gelu, [x], grad)
    assert dispatch.launches == GELU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(kernels, shape, dtype):
    gate, value, grad = operands(shape, dtype, kernels, 3)
    check(swiglu, [gate, value], grad)
    assert dispatch.launches == SWIGLU


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_extreme_values(kernels):
    x = torch.tensor([0.0, -0.0, 1e-30, 40.0, -40.0, 120.0, -120.0, 6e4, -6e4, torch.inf, torch.nan], device=kernels)
    ones = torch.ones_like(x)
    # PyTorch's own gelu(inf) is NaN on some processors.
    definitions = (lambda a: 0.5 * a * (1 + torch.erf(a * 0.5**0.5)), lambda a, b: F.silu(a) * b)
    for function, plain, inputs in zip((gelu, swiglu), definitions, ([x], [x, ones]), strict=True):
        leaves, others = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
        y, wanted = function(*leaves), plain(*others)
        torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-6, atol=1e-30)
        # At infinity the gradient of PyTorch's own expression is NaN.
        for ours, theirs in zip(
            torch.autograd.grad(y, leaves, ones), torch.autograd.grad(wanted, others, ones), strict=True
        ):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-30)


def test_empty(kernels):
    for shape in ((0,), (0, 8), (3, 0)):
        x, value = (t.requires_grad_() for t in operands(shape, torch.float32, kernels, 2))
        (gelu(x).sum() + swiglu(x, value).sum()).backward()
        assert x.grad is not None and value.grad is not None and x.grad.shape == value.grad.shape == shape
    assert not dispatch.launches


@pytest.mark.parametrize("width", [30, 1100])
def test_non_contiguous(kernels, width):
    """Both halves of one product, columns with gaps, transposed, broadcast."""
    joined, grad = operands((6, 2 * width), torch.float32, kernels, 2)
    gate, value = joined.chunk(2, dim=1)
    check(swiglu, [gate, value], grad[:, width:])
    check(gelu, [value], grad[:, :1].expand(6, width))
    check(gelu, [joined[:, ::2]], grad[:, ::2])
    check(swiglu, [gate.t().contiguous().t(), value], grad[:, width:].t().contiguous().t())
    check(swiglu, [gate[:1].expand(6, width), value.view(2, 3, width).flatten(0, 1)], grad[:, width:])
    check(gelu, [value.contiguous().view(2, 3, width).transpose(0, 1)], grad[:, width:].reshape(3, 2, width))


def test_rows_are_read_where_they_are(kernels, monkeypatch):
    """Halves of one product need no copy."""
    joined, grad = operands((5, 64), torch.bfloat16, kernels, 2)
    seen = []
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: seen.append(args))
    torch.ops.vjepa_fast.swiglu_bwd(grad[:, :32], *joined.chunk(2, dim=1))
    (args,) = seen
    assert [x.data_ptr() for x in args[1:3]] == [half.data_ptr() for half in joined.chunk(2, dim=1)]


def test_rows_beyond_two_to_the_31_elements(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    width = 16
    x, value, grad = operands((3, width), torch.float32, kernels, 3)
    far, far_value = far_rows(x), far_rows(value)
    y, grad_x, grad_value = torch.zeros(3, width), torch.zeros(3, width), torch.zeros(3, width)
    shape = {"width": width, "blocks_per_row": 1, "BLOCK": 16}
    leaves = [t.clone().requires_grad_() for t in (x, value)]
    for forward, backward, expected, inputs, grads in (
        (module._gelu_fwd_kernel, module._gelu_bwd_kernel, gelu, [far], [grad_x]),
        (module._swiglu_fwd_kernel, module._swiglu_bwd_kernel, swiglu, [far, far_value], [grad_x, grad_value]),
    ):
        strides = [FAR] * len(inputs) + [width]
        dispatch.launch(forward, (3,), *inputs, y, *strides, **shape)
        dispatch.launch(backward, (3,), grad, *inputs, *grads, *strides, **shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VJEPA_FAST_OPS", "ref")
            wanted = expected(*leaves[: len(inputs)])
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(grads, list(torch.autograd.grad(wanted, leaves[: len(inputs)], grad)))
    # And where the results lie that far apart.
    dispatch.launch(module._gelu_fwd_kernel, (3,), x, far, width, FAR, **shape)
    dispatch.launch(module._gelu_fwd_kernel, (3,), far, y, FAR, width, **shape)
    torch.testing.assert_close(y, F.gelu(F.gelu(x)))


def test_opcheck(kernels):
    ops = torch.ops.vjepa_fast
    gate, value, grad = operands((5, 24), torch.bfloat16, kernels, 3)
    turned = gate.t().contiguous().t()
    for x in (gate, turned, gate[:, ::2]):
        torch.library.opcheck(ops.gelu_fwd.default, (x,))
        torch.library.opcheck(ops.gelu_bwd.default, (grad[:, : x.shape[1]], x))
        torch.library.opcheck(ops.swiglu_fwd.default, (x, value[:, : x.shape[1]]))
        torch.library.opcheck(ops.swiglu_bwd.default, (grad[:, : x.shape[1]], x, value[:, : x.shape[1]]))


@pytest.mark.parametrize("make", [lambda: MLP(24, 40), lambda: SwiGLU(24, 60, True)])
def test_compiles_whole(kernels, make):
    torch.manual_seed(0)
    mlp = make().to(kernels)
    x = torch.randn(7, 24, device=kernels, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    eager = torch.autograd.grad(mlp(x).square().sum(), leaves)
    launched = dict(dispatch.launches)
    compiled = torch.autograd.grad(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x).square().sum(), leaves)
    for ours, oracle in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, oracle)
    # The compiler gets the PyTorch lines, which it can fuse with what surrounds them.
    assert launched in (GELU, SWIGLU) and dispatch.launches == launched


def test_the_pytorch_path_is_pytorchs(monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    for dtype in (*DTYPES, torch.float64):
        gate, value = (torch.randn(5, 33).to(dtype) for _ in range(2))
        assert torch.equal(gelu(gate), F.gelu(gate))
        assert torch.equal(swiglu(gate, value), F.silu(gate) * value)


@pytest.mark.parametrize("value", [torch.ones(3, 7), torch.ones(3, 8, dtype=torch.float64)])
def test_bad_operands(value):
    with pytest.raises(ValueError, match="gate is torch.float32 \\[3, 8\\], value torch.float"):
        swiglu(torch.ones(3, 8), value)


def gelu_case(dtype: torch.dtype, width: int) -> None:
    x = torch.zeros(64, width, dtype=dtype)
    module._gelu_bwd(module._gelu_fwd(x), x)


def swiglu_case(dtype: torch.dtype, width: int, halves: bool) -> None:
    x = torch.zeros(64, 2 * width, dtype=dtype)
    gate, value = x.chunk(2, dim=1) if halves else (x, x)
    module._swiglu_bwd(module._swiglu_fwd(gate, value), gate, value)


COMPILED = {
    "gelu bf16 4096": lambda: gelu_case(torch.bfloat16, 4096),
    "gelu fp32 1537": lambda: gelu_case(torch.float32, 1537),
    "swiglu bf16 4096": lambda: swiglu_case(torch.bfloat16, 4096, False),
    "swiglu bf16 halves of 8192": lambda: swiglu_case(torch.bfloat16, 4096, True),
    "swiglu fp32 1023": lambda: swiglu_case(torch.float32, 1023, False),
}
"""What tests/aot compiles."""
