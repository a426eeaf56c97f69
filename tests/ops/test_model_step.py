"""A training step of the whole model on the kernels, against the same step on PyTorch."""

from __future__ import annotations

import pytest
import torch

import vjepa_fast as vf
from tests.helpers.packed import config, make_batch
from vjepa_fast.config.schema import Dtype
from vjepa_fast.models.layers import make_blocks, run_blocks
from vjepa_fast.ops import layer_norm
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.optim.adamw_ema import ema_update
from vjepa_fast.train.step import TrainStep

KERNELS = [
    "_adamw_ema_factors_kernel",
    "_adamw_ema_kernel",
    "_gelu_bwd_kernel",
    "_gelu_fwd_kernel",
    "_latent_loss_bwd_kernel",
    "_latent_loss_fwd_kernel",
    "_layer_norm_bwd_kernel",
    "_layer_norm_fwd_kernel",
    "_patch_embed_bwd_kernel",
    "_patch_embed_fold_kernel",
    "_patch_embed_fwd_kernel",
    "_patch_embed_unfold_kernel",
    "_rope3d_kernel",
    "_sum_of_squares_kernel",
    "_swiglu_bwd_kernel",
    "_swiglu_fwd_kernel",
    "_variance_loss_bwd_kernel",
    "_variance_loss_fwd_kernel",
    "_variance_loss_stats_kernel",
]


def one_step(device: torch.device, dtype: Dtype) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm, and every gradient."""
    cfg = config(
        fpcs=(2,), embed_dim=24, depth=1, pred_embed_dim=16, pred_num_heads=1, pred_depth=1, use_pred_silu=True
    )
    cfg.loss.reg_coeff = 0.1
    cfg.model.dtype = cfg.train.dtype = dtype
    torch.manual_seed(0)
    model = vf.VJEPA.from_config(cfg).to(device)
    clips, masks = make_batch(cfg)
    step = TrainStep(model, cfg)
    grads: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: grads.__setitem__(name, p.grad.detach().clone())
            )
    result = step(0, [c.to(device) for c in clips], [m.to(device) for m in masks])
    return result.loss.item(), result.grad_norm.item(), grads


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_step_runs_every_kernel(kernels: torch.device, dtype: Dtype, rtol: float, monkeypatch) -> None:
    ours = one_step(kernels, dtype)
    # The rows behind the last token are attention's business where a library attends.
    behind = ["_zero_tail_kernel"] if kernels.type == "cuda" and dtype == "bfloat16" else []
    assert sorted(name for name, count in dispatch.launches.items() if count) == KERNELS + behind
    # One kernel turns both ways: forward in three networks of one block, backward in encoder and predictor.
    assert dispatch.launches["_rope3d_kernel"] == 3 + 2
    dispatch.launches.clear()
    monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    plain = one_step(kernels, dtype)
    assert not dispatch.launches
    assert ours[:2] == pytest.approx(plain[:2], rel=rtol)
    assert ours[2].keys() == plain[2].keys()
    oracle = one_step(kernels, "float32")[2]
    for name, expected in oracle.items():
        # A key bias has no gradient but rounding, so errors are measured against a typical gradient too.
        floor = rtol * (expected.norm() + 1e-2 * plain[1])
        mine, theirs = ((found[2][name] - expected).norm() for found in (ours, plain))
        assert mine <= 2 * theirs + floor, name


def test_dense_step(kernels: torch.device, monkeypatch) -> None:
    """V-JEPA 2.1 in fp32: four levels in one launch for the target and one for the context tokens."""
    cfg = config(
        fpcs=(2,),
        embed_dim=12,
        num_heads=1,
        depth=4,
        pred_embed_dim=12,
        pred_num_heads=1,
        pred_depth=1,
        rope_style="interleaved",
        n_output_distillation=4,
        img_temporal_dim_size=1,
        modality_embedding=True,
        interpolate_rope=True,
    )
    cfg.model.return_all_tokens = True
    clips, masks = make_batch(cfg)
    # One clip: the interpreter takes a while.
    clips, masks = [clips[0][:1]], [masks[0].narrow(0, 1)]
    results = []
    for choice in ("triton", "ref"):
        monkeypatch.setenv("VJEPA_FAST_OPS", choice)
        dispatch.launches.clear()
        torch.manual_seed(0)
        model = vf.VJEPA(cfg.model, weight_distance_loss=True).to(kernels)
        loss = model([c.to(kernels) for c in clips], [m.to(kernels) for m in masks]).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        launched = dispatch.launches["_latent_loss_fwd_kernel"], dispatch.launches["_latent_loss_bwd_kernel"]
        assert launched == ((2, 2) if choice == "triton" else (0, 0))
    (loss, found), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * (grad.norm() + 1e-2 * total), name


def test_kernels_add_where_they_norm(kernels: torch.device, monkeypatch) -> None:
    """Three blocks have six norms, of which the first alone reads no sum."""
    blocks = make_blocks(3, 16, 2, 2.0, 0.0, False, True).to(kernels)
    x = torch.randn(7, 16, device=kernels, requires_grad=True)
    packing = Packing.uniform(1, 7, kernels)
    branches = []
    stock = layer_norm._LayerNorm.apply
    monkeypatch.setattr(layer_norm._LayerNorm, "apply", lambda *args: branches.append(args[1]) or stock(*args))
    *_, (x, branch) = run_blocks(blocks, x, packing, None)
    (x + branch).sum().backward()
    assert [b is None for b in branches] == [True, *[False] * 5]
    assert dispatch.launches["_layer_norm_fwd_kernel"] == dispatch.launches["_layer_norm_bwd_kernel"] == 6


def test_the_moving_average_by_itself_has_a_kernel(kernels: torch.device) -> None:
    """For those who train with another optimizer."""
    model = vf.VJEPA.from_config(
        config(fpcs=(2,), embed_dim=24, depth=1, pred_embed_dim=16, pred_num_heads=1, pred_depth=1)
    )
    model.to(kernels)
    ema_update(model.target_encoder, model.encoder, 0.99)
    assert list(dispatch.launches) == ["_ema_kernel"]
