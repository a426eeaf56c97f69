"""The loss kernels against PyTorch, and the definition against the reference's expression."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.conftest import FAR, far_rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import latent_loss as module
from vjepa_fast.ops.latent_loss import latent_loss, latent_loss_ref, target_features
from vjepa_fast.ops.triton_support import dispatch

SIZES = [(1, 1), (2, 16), (13, 31), (7, 257), (5, 1024), (3, 1408)]


def operands(count: int, width: int, dtype: torch.dtype, device: torch.device, num_features: int = 0):
    g = torch.Generator().manual_seed(count * 10007 + width)
    num_features = num_features or count
    predictions = torch.randn(count, width, generator=g).to(device, dtype)
    features = (2 * torch.randn(num_features, width, generator=g) + 0.5).to(device, dtype)
    weights = (torch.rand(count, generator=g, dtype=torch.float64) / max(1, count)).to(device)
    rows = torch.randint(max(1, num_features), (count,), generator=g).to(device)
    weight, bias = 1 + 0.1 * torch.randn(width, generator=g), 0.1 * torch.randn(width, generator=g)
    norm = weight.to(device), bias.to(device), 1e-6
    return predictions, features, weights, rows, norm


def check(
    predictions: Tensor,
    features: Tensor,
    weights: Tensor,
    exponent: float,
    rows,
    norm,
    scale: float = 1.0,
    levels: int = 1,
):
    """Value and gradient of the kernels; the truth is the definition in fp64 on the same operands."""

    def run(function, dtype=None):
        z = predictions.detach().to(dtype or predictions.dtype).requires_grad_()
        f = features if dtype is None else features.to(dtype)
        n = None if norm is None else (*(p if dtype is None else p.to(dtype) for p in norm[:2]), norm[2])
        loss = function(z, f, weights, exponent, rows, n, levels)
        return loss, torch.autograd.grad(loss * scale, z)[0]

    results = [run(latent_loss), run(latent_loss_ref), run(latent_loss_ref, torch.float64)]
    for name, *triple in zip(("loss", "grad"), *results, strict=True):
        assert_as_good(name, *triple)
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("count, width", SIZES)
def test_value_and_gradient(kernels, count, width, dtype, exponent):
    z, features, weights, rows, norm = operands(count, width, dtype, kernels, 2 * count + 1)
    check(z, features, weights, exponent, rows, norm)
    assert dispatch.launches == {"_latent_loss_fwd_kernel": 1, "_latent_loss_bwd_kernel": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [1.0, 1.5])
@pytest.mark.parametrize("count, width, levels", [(1, 1, 4), (7, 37, 4), (3, 1664, 4), (5, 16, 3)])
def test_levels(kernels, count, width, levels, dtype, exponent):
    """Rows of several levels, as parts of wider rows."""
    z, features, weights, rows, norm = operands(count, levels * width, dtype, kernels, count + 2)
    wide = torch.cat([z, torch.full_like(z, torch.nan)], dim=1)[:, : z.shape[1]]
    check(wide, features, weights, exponent, rows, norm, levels=levels)
    assert dispatch.launches == {"_latent_loss_fwd_kernel": 1, "_latent_loss_bwd_kernel": 1}


def test_levels_are_losses_of_their_own(kernels):
    z, features, weights, rows, (weight, bias, eps) = operands(6, 4 * 24, torch.float32, kernels)
    parts = [
        latent_loss(
            *(x[:, 24 * i : 24 * i + 24] for x in (z, features)),
            weights,
            1.0,
            rows,
            (weight[24 * i : 24 * i + 24], bias[24 * i : 24 * i + 24], eps),
        )
        for i in range(4)
    ]
    together = latent_loss(z, features, weights, 1.0, rows, (weight, bias, eps), 4)
    torch.testing.assert_close(together, torch.stack(parts).mean())


@pytest.mark.parametrize("with_rows, with_norm", [(False, False), (True, False), (False, True)])
def test_optional_operands(kernels, with_rows, with_norm):
    z, features, weights, rows, norm = operands(11, 48, torch.float32, kernels)
    check(z, features, weights, 1.0, rows if with_rows else None, norm if with_norm else None)


def test_empty(kernels):
    z, features, weights, _, norm = operands(0, 8, torch.float32, kernels, 3)
    z.requires_grad_()
    loss = latent_loss(z, features, weights, rows=torch.zeros(0, dtype=torch.int64, device=kernels), final_norm=norm)
    loss.backward()
    assert loss.item() == 0.0 and z.grad is not None and z.grad.shape == (0, 8) and not dispatch.launches


def test_non_contiguous(kernels):
    z, features, weights, rows, norm = operands(9, 70, torch.float32, kernels)
    spread = torch.full((9, 140), torch.nan, device=kernels)
    spread[:, :70] = z
    check(
        spread[:, :70],
        features.t().contiguous().t(),
        weights.repeat_interleave(2)[::2],
        1.0,
        rows.repeat_interleave(2)[::2],
        (norm[0].repeat_interleave(2)[::2], norm[1], norm[2]),
    )


def test_fp16_gradient_keeps_its_smallest_values(kernels):
    """Weights as small as a training batch has them, with the scale of a GradScaler on top."""
    z, features, weights, rows, norm = operands(5, 1024, torch.float16, kernels)
    _, grad = check(z, features, weights * 1e-4, 1.0, rows, norm, scale=2.0**16)
    assert (grad != 0).all()


def test_nan_reaches_loss_and_gradient_and_infinity_the_loss(kernels):
    for exponent in (1.0, 2.0):
        z, features, weights, rows, norm = operands(4, 33, torch.bfloat16, kernels)
        z[1, 5] = torch.nan
        z.requires_grad_()
        loss = latent_loss(z, features, weights, exponent, rows, norm)
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.isnan() and grad[1, 5].isnan() and grad.isnan().sum() == 1
    z = z.detach().nan_to_num(0.0)
    z[2, 3] = torch.inf
    assert latent_loss(z, features, weights, 1.0, rows, norm).isinf()


def test_rows_beyond_two_to_the_31_elements(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    width = 16
    z, features, weights, _, _ = operands(3, width, torch.float32, kernels)
    far = far_rows(features)
    losses, slopes = torch.zeros(3), torch.zeros(3, width, dtype=torch.int8)
    rows = torch.tensor([0, 1, 2])
    dispatch.launch(
        module._latent_loss_fwd_kernel,
        (3,),
        z,
        far,
        rows,
        weights.float(),
        None,
        None,
        losses,
        slopes,
        width,
        FAR,
        width,
        0.0,
        1e-5,
        1.0,
        IS_L1=True,
        LEVELS=1,
        BLOCK=16,
    )
    torch.testing.assert_close(losses.sum(), latent_loss_ref(z, features, weights, 1.0, rows, None))


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_opcheck(kernels, exponent):
    z, features, weights, rows, norm = operands(5, 24, torch.bfloat16, kernels)
    forward = torch.ops.vjepa_fast.latent_loss_fwd.default
    args = (z, features, rows, weights.float(), norm[0], norm[1], 1e-6, exponent, 4)
    torch.library.opcheck(forward, args)
    torch.library.opcheck(
        forward, (z.t().contiguous().t(), features, None, weights.float(), None, None, 0.0, exponent, 1)
    )
    slopes = forward(*args)[1]
    grad = torch.tensor(2.0, device=kernels)
    torch.library.opcheck(
        torch.ops.vjepa_fast.latent_loss_bwd.default, (slopes, weights.float(), grad, torch.bfloat16, 4)
    )


def test_compiles_whole(kernels):
    z, features, weights, rows, norm = operands(6, 40, torch.bfloat16, kernels)
    z.requires_grad_()

    def scaled(z: Tensor) -> Tensor:
        return 3.0 * latent_loss(z, features, weights, 1.0, rows, norm)

    (eager,) = torch.autograd.grad(scaled(z), z)
    (compiled,) = torch.autograd.grad(torch.compile(scaled, fullgraph=True, backend="aot_eager")(z), z)
    assert torch.equal(eager, compiled)
    assert dispatch.launches == {"_latent_loss_fwd_kernel": 2, "_latent_loss_bwd_kernel": 2}


@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5])
def test_definition_is_the_mean_over_tokens_then_pairs(exponent):
    """fp64, thus PyTorch whatever is chosen."""
    torch.manual_seed(0)
    z, features = torch.randn(2, 10, 4, dtype=torch.float64)
    weight, bias = torch.rand(2, 4, dtype=torch.float64)
    rows = torch.randperm(10)
    h = F.layer_norm(F.layer_norm(features, (4,), weight, bias, 1e-6)[rows], (4,))
    parts = [((z[:4] - h[:4]).abs() ** exponent).mean(), ((z[4:] - h[4:]).abs() ** exponent).mean()]
    weights = torch.tensor([1 / 8] * 4 + [1 / 12] * 6, dtype=torch.float64)
    loss = latent_loss(z, features, weights, exponent, rows, (weight, bias, 1e-6))
    torch.testing.assert_close(loss, (parts[0] + parts[1]) / 2 / exponent)
    torch.testing.assert_close(target_features(features, rows, (weight, bias, 1e-6)), h)


def test_no_gradient_reaches_the_features(kernels):
    z, features, weights, rows, (weight, bias, eps) = operands(3, 8, torch.float32, kernels)
    features.requires_grad_()
    weight.requires_grad_()
    assert not latent_loss(z, features, weights, 1.0, rows, (weight, bias, eps)).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": torch.ones(4)}, "weights \\[4\\]"),
        ({"features": torch.ones(4, 8)}, "features \\[4, 8\\]"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "rows \\[2\\]"),
        ({"exponent": 0.0}, "exponent is 0.0; expected a positive number"),
        ({"levels": 3}, "a width of 8 does not hold 3 levels"),
    ],
)
def test_bad_operands(change, message):
    good = {"predictions": torch.ones(3, 8), "features": torch.ones(3, 8), "weights": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        latent_loss(**{**good, **change})


def latent_loss_case(dtype: torch.dtype, width: int, exponent: float, levels: int = 1) -> None:
    rows, weights, affine = torch.zeros(64, dtype=torch.int64), torch.zeros(64), torch.zeros(levels * width)
    x = torch.zeros(64, levels * width, dtype=dtype)
    _, slopes = module._latent_loss_fwd(x, x, rows, weights, affine, affine, 1e-6, exponent, levels)
    module._latent_loss_bwd(slopes, weights, torch.zeros(()), dtype, levels)


COMPILED = {
    "latent_loss bf16 1024 p=1": lambda: latent_loss_case(torch.bfloat16, 1024, 1.0),
    "latent_loss bf16 1408 p=1": lambda: latent_loss_case(torch.bfloat16, 1408, 1.0),
    "latent_loss bf16 1024 p=1.5": lambda: latent_loss_case(torch.bfloat16, 1024, 1.5),
    "latent_loss bf16 4 x 1024 p=1": lambda: latent_loss_case(torch.bfloat16, 1024, 1.0, 4),
    "latent_loss fp32 4096 p=1": lambda: latent_loss_case(torch.float32, 4096, 1.0),
}
"""What tests/aot compiles."""
