"""The kernels of the variance term against PyTorch, and the definition against the reference's expression."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

import vjepa_fast as vf
from tests.helpers.packed import config, make_batch
from tests.ops.conftest import FAR, far_rows
from tests.ops.tolerance import assert_as_good
from vjepa_fast.config.schema import Config
from vjepa_fast.models import jepa
from vjepa_fast.models.jepa import JEPAOutput
from vjepa_fast.ops import variance_loss as module
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.ops.variance_loss import variance_loss, variance_loss_ref
from vjepa_fast.train.step import TrainStep

KERNELS = {"_variance_loss_stats_kernel": 1, "_variance_loss_fwd_kernel": 1, "_variance_loss_bwd_kernel": 1}


def packed(lengths: list[int], device: torch.device) -> Packing:
    return Packing(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))


def operands(lengths: list[int], num_clips: int, width: int, dtype: torch.dtype, device: torch.device, tail: int = 0):
    """Standard deviations on both sides of 1, means far from 0."""
    g = torch.Generator().manual_seed(sum(lengths) * 10007 + width)
    count = sum(lengths) + tail
    spread = torch.rand(width, generator=g) + 0.5
    z = (torch.randn(count, width, generator=g) * spread + 3.0).to(device, dtype)
    weights = torch.rand(num_clips, generator=g, dtype=torch.float64).to(device)
    return z, packed(lengths, device), weights


def check(z: Tensor, packing: Packing, weights: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    def run(function, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        leaf = (z if dtype is None else z.to(dtype)).detach().requires_grad_()
        loss = function(leaf, packing, weights)
        return loss, torch.autograd.grad(loss * scale, leaf)[0]

    ours = run(variance_loss)
    for name, *triple in zip(
        ("loss", "grad"), ours, run(variance_loss_ref), run(variance_loss_ref, torch.float64), strict=True
    ):
        assert_as_good(name, *triple)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "lengths, num_clips, width",
    [
        ([2], 1, 1),
        ([7, 7], 2, 31),
        ([5, 3, 1, 40, 33, 31], 3, 16),
        ([0, 9, 130, 2], 2, 70),
        ([300, 128, 127, 129], 4, 64),
        ([31, 32, 33, 96, 97, 95], 2, 129),
    ],
)
def test_value_and_gradient(kernels, lengths, num_clips, width, dtype):
    z, packing, weights = operands(lengths, num_clips, width, dtype, kernels)
    loss, grad = check(z, packing, weights)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert dispatch.launches == KERNELS


def test_equals_the_formula_on_dense_predictions():
    """V-JEPA 1's expression over a list of masks."""
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(3, n, 20, generator=g, dtype=torch.float64) * 0.8 for n in (11, 4)]
    std = sum(torch.sqrt(torch.var(z, dim=1) + 0.0001) for z in dense) / len(dense)
    wanted = torch.mean(torch.relu(1.0 - std))
    packing = packed([11, 11, 11, 4, 4, 4], torch.device("cpu"))
    ours = variance_loss(torch.cat([z.flatten(0, 1) for z in dense]), packing, torch.full((3,), 1 / 3))
    torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=0)
    assert ours > 0.05


def test_mean_far_from_zero(kernels):
    """The variance of large numbers that differ little; sums of squares would lose it."""
    z, packing, weights = operands([200, 50], 1, 16, torch.float32, kernels)
    check(z * 0.1 + 30.0, packing, weights)


def test_rows_behind_the_last_sequence_count_for_nothing(kernels):
    for tail in (1, 700):
        z, packing, weights = operands([20, 30], 1, 18, torch.float32, kernels, tail)
        z[50:] = torch.nan
        _, grad = check_head(z, packing, weights, 50)
        assert torch.equal(grad[50:], torch.zeros(tail, 18, device=kernels))


def check_head(z: Tensor, packing: Packing, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    leaf, head = z.clone().requires_grad_(), z[:count].clone().requires_grad_()
    loss, wanted = variance_loss(leaf, packing, weights), variance_loss(head, packing, weights)
    torch.testing.assert_close(loss, wanted)
    grads = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(wanted, head)[0]
    assert torch.equal(grads[0][:count], grads[1])
    return loss, grads[0]


def test_reference_ignores_rows_behind_too():
    z, packing, weights = operands([20, 30], 1, 18, torch.float32, torch.device("cpu"), 5)
    z[50:] = torch.nan
    _, grad = check_head(z, packing, weights, 50)
    assert torch.equal(grad[50:], torch.zeros(5, 18))


def test_constant_predictions_and_nan(kernels):
    z, packing, weights = operands([8, 8], 2, 6, torch.float32, kernels)
    z[:8] = 2.5
    loss, grad = check(z, packing, weights)
    assert torch.equal(grad[:8], torch.zeros_like(grad[:8])) and loss > 0
    z[3, 2] = torch.nan
    leaf = z.requires_grad_()
    loss = variance_loss(leaf, packing, weights)
    loss.backward()
    assert loss.isnan() and leaf.grad[:8, 2].isnan().all() and not leaf.grad[8:].isnan().any()


def test_large_loss_scale_is_applied_in_fp32(kernels):
    z, packing, weights = operands([64, 64], 1, 32, torch.float16, kernels)
    small = weights * 1e-4
    _, grad = check(z, packing, small, scale=2.0**16)
    assert (grad != 0).float().mean() > 0.2


def test_non_contiguous(kernels):
    z, packing, weights = operands([13, 40], 1, 30, torch.float32, kernels)
    spread = torch.full((53, 90), torch.nan, device=kernels)
    spread[:, 30:60] = z
    plain = check(z, packing, weights)
    for other in (spread[:, 30:60], z.t().contiguous().t()):
        for ours, wanted in zip(check(other, packing, weights), plain, strict=True):
            assert torch.equal(ours, wanted)
    check(z[:1].expand(53, 30), packing, weights.repeat_interleave(2)[::2])


def test_no_tokens(kernels):
    z = torch.zeros(0, 8, device=kernels, requires_grad=True)
    loss = variance_loss(z, packed([0, 0], kernels), torch.ones(2, device=kernels) / 2)
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.99)
    assert z.grad is not None and z.grad.shape == (0, 8)


def test_rows_beyond_two_to_the_31_elements(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    width = 16
    z, packing, weights = operands([3], 1, width, torch.float32, kernels)
    far = far_rows(z)
    leaf = z.clone().requires_grad_()
    wanted = variance_loss_ref(leaf, packing, weights)
    partial, losses, grad = torch.zeros(1, 1, 2, width), torch.zeros(1, 1), torch.zeros(3, width)
    means, scales, slopes = torch.zeros(3, 1, width)
    offsets, cols = packing.cu_seqlens, {"COLS": 16}
    dispatch.launch(
        module._variance_loss_stats_kernel, (1,), far, offsets, partial, FAR, 1, width, ROWS=2, TILES=2, **cols
    )
    dispatch.launch(
        module._variance_loss_fwd_kernel,
        (1, 1),
        offsets,
        partial,
        weights.float(),
        losses,
        means,
        scales,
        slopes,
        1,
        1,
        width,
        module.EPS,
        CHUNK=4,
        **cols,
    )
    dispatch.launch(
        module._variance_loss_bwd_kernel,
        (1,),
        far,
        offsets,
        means,
        scales,
        slopes,
        torch.ones(()),
        grad,
        FAR,
        3,
        1,
        1,
        1,
        width,
        CHUNK=4,
        ROWS=2,
        **cols,
    )
    torch.testing.assert_close(losses.sum(), wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, leaf)[0])


def test_opcheck(kernels):
    z, packing, weights = operands([9, 4, 7, 6], 2, 24, torch.bfloat16, kernels)
    forward, backward = torch.ops.vjepa_fast.variance_loss_fwd.default, torch.ops.vjepa_fast.variance_loss_bwd.default
    rest = packing.cu_seqlens, packing.max_seqlen
    for some in (z, z.t().contiguous().t()):
        torch.library.opcheck(forward, (some, *rest, weights.float()))
        loss, *statistics = forward(some, *rest, weights.float())
        torch.library.opcheck(backward, (torch.ones_like(loss), some, *rest, *statistics))


def test_compiles_whole(kernels):
    z, packing, weights = operands([9, 14], 1, 40, torch.bfloat16, kernels)
    leaf = z.requires_grad_()

    def used(z: Tensor) -> Tensor:
        return variance_loss(z.sin(), packing, weights) * 2

    (eager,) = torch.autograd.grad(used(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(used, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert torch.equal(compiled, eager)
    assert dispatch.launches == {name: 2 for name in KERNELS}


def one_loss(reg_coeff: float) -> JEPAOutput:
    cfg = trial_config("batch_min", (8,))
    torch.manual_seed(0)
    model = spread_out(vf.VJEPA(cfg.model, reg_coeff=reg_coeff))
    clips, masks = make_batch(cfg)
    return model(clips, masks)


def trial_config(truncate: str, fpcs: tuple[int, ...]) -> Config:
    # Without RoPE, so that the positions alone make the predictions of fresh weights differ.
    return config(truncate, fpcs, depth=1, pred_depth=1, use_rope=False, num_frames=8)


def spread_out(model: vf.VJEPA) -> vf.VJEPA:
    """Predictions whose standard deviations are about 1."""
    model.predictor.predictor_proj.weight.data.mul_(10)
    return model.double()


def test_model_adds_the_term():
    plain, ours = one_loss(0.0), one_loss(0.3)
    (dense,) = plain.predictions
    std = sum(torch.sqrt(torch.var(z, dim=1) + 0.0001) for z in dense) / len(dense)
    term = torch.mean(torch.relu(1.0 - std))
    torch.testing.assert_close(ours.loss, plain.loss + 0.3 * term)
    assert 0.05 < term < 0.95


def test_no_cost_where_it_is_off(monkeypatch):
    monkeypatch.delattr(jepa, "variance_loss")
    one_loss(0.0)


@pytest.mark.parametrize("fpcs", [(8,), (4, 8)])
@pytest.mark.parametrize("truncate", ["batch_min", "none"])
def test_same_however_the_batch_is_divided(truncate, fpcs):
    """Gradients of three micro-batches add up to those of the whole batch."""
    norms = []
    for num_micro in (1, 3):
        cfg = trial_config(truncate, fpcs)
        cfg.loss.reg_coeff, cfg.optimization.grad_accumulation = 5.0, num_micro
        torch.manual_seed(0)
        result = TrainStep(spread_out(vf.VJEPA.from_config(cfg)), cfg)(0, *make_batch(cfg))
        norms.append((result.loss, result.grad_norm))
    torch.testing.assert_close(norms[0], norms[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": torch.ones(2)}, "3 sequences and weights of shape \\[2\\]"),
        ({"predictions": torch.ones(5, 4)}, "predictions have shape \\[5, 4\\], the sequences 6 tokens"),
    ],
)
def test_bad_operands(change, message):
    good = {
        "predictions": torch.ones(6, 4),
        "weights": torch.ones(3),
        "packing": packed([1, 2, 3], torch.device("cpu")),
    }
    with pytest.raises(ValueError, match=message):
        variance_loss(**{**good, **change})


def variance_loss_case(dtype: torch.dtype, width: int) -> None:
    x, cu_seqlens, weights = torch.zeros(64, width, dtype=dtype), torch.zeros(49, dtype=torch.int32), torch.zeros(24)
    loss, *statistics = module._variance_loss_fwd(x, cu_seqlens, 1305, weights)
    module._variance_loss_bwd(loss, x, cu_seqlens, 1305, *statistics)


COMPILED = {
    "variance_loss bf16 1024": lambda: variance_loss_case(torch.bfloat16, 1024),
    "variance_loss fp32 391": lambda: variance_loss_case(torch.float32, 391),
}
"""What tests/aot compiles."""
