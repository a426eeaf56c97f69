"""The layer-norm kernels against PyTorch, alone and with the residual add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.conftest import FAR, far_rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import layer_norm as module
from vjepa_fast.ops.layer_norm import LayerNorm, add_layer_norm, layer_norm, layer_norm_ref
from vjepa_fast.ops.triton_support import dispatch

SIZES = [(1, 1), (2, 16), (13, 31), (29, 257), (5, 1024), (3, 1408)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def operands(count: int, width: int, dtype: torch.dtype, device: torch.device, num: int = 4) -> list[Tensor]:
    """weight and bias in fp32, then rows: x, branch, gradients."""
    g = torch.Generator().manual_seed(count * 10007 + width)
    weight, bias = 1 + 0.2 * torch.randn(width, generator=g), 0.2 * torch.randn(width, generator=g)
    rows = [(torch.randn(count, width, generator=g) + 0.3).to(device, dtype) for _ in range(num)]
    return [weight.to(device), bias.to(device), *rows]


def check(function, names: list[str], inputs: list[Tensor], grads: list[Tensor]) -> None:
    """`function(*inputs)` by kernel, by PyTorch, and in fp64."""

    def run(choice: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        # Strides are part of the case.
        leaves = [
            x if dtype or x.is_contiguous() else like.detach().requires_grad_()
            for x, like in zip(leaves, inputs, strict=True)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VJEPA_FAST_OPS", choice)
            outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        upstream = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    for name, *triple in zip(names, run("triton"), run("ref"), run("ref", torch.float64), strict=True):
        assert_as_good(name, *triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, width", SIZES)
def test_layer_norm(kernels, count, width, dtype):
    weight, bias, x, grad = operands(count, width, dtype, kernels, 2)
    check(lambda x, w, b: layer_norm(x, w, b, EPS), ["y", "dx", "dweight", "dbias"], [x, weight, bias], [grad])
    assert dispatch.launches == {"_layer_norm_fwd_kernel": 1, "_layer_norm_bwd_kernel": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, width", SIZES)
def test_add_layer_norm(kernels, count, width, dtype):
    weight, bias, x, branch, grad, grad_sum = operands(count, width, dtype, kernels)
    check(
        lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS),
        ["sum", "y", "dx", "dbranch", "dweight", "dbias"],
        [x, branch, weight, bias],
        [grad_sum, grad],
    )
    assert dispatch.launches == {"_layer_norm_fwd_kernel": 1, "_layer_norm_bwd_kernel": 1}


def test_stream_and_branch_of_different_dtypes_and_output_cast(kernels):
    weight, bias, x, branch, grad, grad_sum = operands(7, 96, torch.bfloat16, kernels)

    def cast(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, r, w, b, EPS, None if x.dtype == torch.float64 else torch.bfloat16)

    check(cast, ["sum", "y", "dx", "dbranch", "dweight", "dbias"], [x.float(), branch, weight, bias], [grad_sum, grad])
    assert cast(x.float(), branch, weight, bias)[1].dtype == torch.bfloat16


def test_only_one_output_is_used(kernels):
    weight, bias, x, branch = operands(5, 40, torch.float32, kernels, 2)
    for used in (0, 1):
        grads = []
        for choice in ("triton", "ref"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VJEPA_FAST_OPS", choice)
                leaf = x.clone().requires_grad_()
                add_layer_norm(leaf, branch, weight, bias, EPS)[used].square().sum().backward()
                grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_empty(kernels):
    weight, bias, x, branch = operands(0, 8, torch.float32, kernels, 2)
    leaf, weight = x.requires_grad_(), weight.requires_grad_()
    total, y = add_layer_norm(leaf, branch, weight, bias, EPS)
    (total.sum() + y.sum()).backward()
    assert y.shape == (0, 8) and leaf.grad is not None and leaf.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and not dispatch.launches


def test_non_contiguous(kernels):
    weight, bias, x, branch, grad, grad_sum = operands(11, 30, torch.float32, kernels)
    spread = torch.full((11, 90), torch.nan, device=kernels)
    spread[:, 30:60] = x
    check(
        lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS),
        ["sum", "y", "dx", "dbranch", "dweight", "dbias"],
        [spread[:, 30:60], branch.t().contiguous().t(), weight.repeat_interleave(2)[::2], bias],
        [grad_sum.t().contiguous().t(), grad.mean().expand(11, 30)],
    )


def test_leading_dimensions(kernels):
    weight, bias, x = operands(6, 20, torch.float32, kernels, 1)
    flat = layer_norm(x, weight, bias, EPS)
    assert torch.equal(layer_norm(x.view(2, 3, 20), weight, bias, EPS), flat.view(2, 3, 20))


def test_rows_beyond_two_to_the_31_elements(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    width = 16
    weight, bias, x, grad = operands(3, width, torch.float32, kernels, 2)
    far = far_rows(x)
    y, mean, rstd, grad_x = torch.zeros(3, width), torch.zeros(3), torch.zeros(3), torch.zeros(3, width)
    dispatch.launch(
        module._layer_norm_fwd_kernel, (3,), far, None, weight, bias, None, y, mean, rstd, FAR, 0, width, EPS, BLOCK=16
    )
    leaf = x.clone().requires_grad_()
    expected = layer_norm_ref(leaf, None, weight, bias, EPS, torch.float32)[1]
    torch.testing.assert_close(y, expected)
    dispatch.launch(
        module._layer_norm_bwd_kernel,
        (1,),
        grad,
        None,
        far,
        weight,
        mean,
        rstd,
        grad_x,
        torch.zeros(1, width),
        torch.zeros(1, width),
        FAR,
        3,
        width,
        3,
        BLOCK=16,
    )
    torch.testing.assert_close(grad_x, torch.autograd.grad(expected, leaf, grad)[0])


def test_opcheck(kernels):
    weight, bias, x, branch, grad, grad_sum = operands(5, 24, torch.bfloat16, kernels)
    forward, backward = torch.ops.vjepa_fast.layer_norm_fwd.default, torch.ops.vjepa_fast.layer_norm_bwd.default
    for some_x, some_branch in ((x, branch), (x, None), (x.t().contiguous().t(), branch.float())):
        torch.library.opcheck(forward, (some_x, some_branch, weight, bias, EPS, torch.bfloat16))
    total, _, mean, rstd = forward(x, branch, weight, bias, EPS, torch.bfloat16)
    for some_grad in (grad_sum, None):
        torch.library.opcheck(backward, (grad, some_grad, total, weight, mean, rstd))
    torch.library.opcheck(backward, (grad.t().contiguous().t(), None, total, weight, mean, rstd))


def test_compiles_whole(kernels):
    weight, bias, x, branch = operands(6, 40, torch.bfloat16, kernels, 2)
    leaves = [t.requires_grad_() for t in (x, branch, weight, bias)]

    def used(*args: Tensor) -> Tensor:
        total, y = add_layer_norm(*args, EPS)
        return (layer_norm(y.sin(), weight, bias, EPS) + total).float().square().sum()

    eager = torch.autograd.grad(used(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(used, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for ours, oracle in zip(compiled, eager, strict=True):
        assert torch.equal(ours, oracle)
    assert dispatch.launches == {"_layer_norm_fwd_kernel": 4, "_layer_norm_bwd_kernel": 4}


def test_module_keeps_the_dtype_of_its_input(kernels):
    norm = LayerNorm(32, eps=EPS).to(kernels)
    for dtype in DTYPES:
        assert norm(torch.randn(3, 32, device=kernels).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "x, branch, message",
    [(torch.ones(3, 8), None, "weight \\[7\\]"), (torch.ones(3, 7), torch.ones(7), "branch \\[7\\]")],
)
def test_bad_operands(x, branch, message):
    with pytest.raises(ValueError, match=message):
        if branch is None:
            layer_norm(x, torch.ones(7), torch.ones(7), EPS)
        else:
            add_layer_norm(x, branch, torch.ones(7), torch.ones(7), EPS)


def layer_norm_case(dtype: torch.dtype, width: int, with_branch: bool) -> None:
    x, affine = torch.zeros(64, width, dtype=dtype), torch.zeros(width)
    branch = x if with_branch else None
    _, y, mean, rstd = module._layer_norm_fwd(x, branch, affine, affine, 1e-6, dtype)
    module._layer_norm_bwd(y, branch, x, affine, mean, rstd)


COMPILED = {
    "layer_norm bf16 1024": lambda: layer_norm_case(torch.bfloat16, 1024, False),
    "layer_norm bf16 1024 + residual": lambda: layer_norm_case(torch.bfloat16, 1024, True),
    "layer_norm bf16 1408 + residual": lambda: layer_norm_case(torch.bfloat16, 1408, True),
    "layer_norm fp32 384 + residual": lambda: layer_norm_case(torch.float32, 384, True),
    "layer_norm fp32 4096 + residual": lambda: layer_norm_case(torch.float32, 4096, True),
}
"""What tests/aot compiles."""
