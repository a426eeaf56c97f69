"""AdamWEMA against torch's AdamW and the reference's moving average, by kernels and by PyTorch, whole and sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.optim.adamw_runs import (
    assert_equal_runs,
    give_gradients,
    gradients_of_step,
    make_model,
    our_step,
    reference_step,
    set_values,
    torch_adamw,
)
from vjepa_fast.ops.linear import Linear, shadow_of
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.optim.adamw_ema import AdamWEMA, ema_update, parameter_groups

BAD = (float("nan"), float("inf"))


@pytest.fixture(params=["triton", "ref"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By kernels in the interpreter, and by PyTorch."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not dispatch.interpreted():
            pytest.skip("these tensors are on the CPU")
        from tests.helpers.interpreter import repair

        repair()
    monkeypatch.setenv("VJEPA_FAST_OPS", request.param)
    dispatch.launches.clear()
    yield request.param


def test_many_steps_equal_torch(path):
    # A step takes the interpreter a third of a second.
    num_steps = 20 if path == "triton" else 100
    ours, plain = make_model(), make_model()
    optimizer, oracle = AdamWEMA(ours, lr=1e-3), torch_adamw(plain)
    start = copy.deepcopy(plain)
    for step in range(num_steps):
        grads = gradients_of_step(plain, step)
        give_gradients(ours, grads)
        give_gradients(plain, grads)
        our_step(optimizer, step)
        reference_step(oracle, plain, step)
    assert_equal_runs(ours, plain)
    expected = torch.nn.utils.get_total_norm(grads.values())
    torch.testing.assert_close(optimizer.grad_norm, expected)
    assert optimizer.skipped == 0
    if path == "triton":
        assert dispatch.launches == {
            "_sum_of_squares_kernel": 4 * num_steps,
            "_adamw_ema_factors_kernel": num_steps,
            "_adamw_ema_kernel": 2 * num_steps,
        }
    for (name, moved), before in zip(ours.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(moved, before) == (name == "predictor.mask_tokens.1"), name
    for a, b in zip(optimizer.state_dict()["state"].values(), oracle.state_dict()["state"].values(), strict=True):
        assert a["step"] == b["step"] == num_steps
        for key in ("exp_avg", "exp_avg_sq"):
            assert (a[key] - b[key]).norm() <= 1e-6 * b[key].norm()


def test_each_network_is_clipped_by_its_own_norm(path):
    """As by torch.nn.utils.clip_grad_norm_: at first neither, then the predictor, then both, then neither."""
    ours, plain = make_model(), make_model()
    optimizer, oracle = AdamWEMA(ours, lr=1e-3, clip_norm=float("inf")), torch_adamw(plain)
    for step in range(4):
        grads = gradients_of_step(plain, step)
        grads = {name: g * (50.0 if name.startswith("predictor") else 1.0) for name, g in grads.items()}
        give_gradients(ours, grads)
        give_gradients(plain, grads)
        norms = [
            float(torch.nn.utils.get_total_norm(g for name, g in grads.items() if name.startswith(network)))
            for network in ("encoder", "predictor")
        ]
        assert norms[0] < norms[1]
        clip_norm = (float("inf"), sum(norms) / 2, norms[0] / 3, 2 * norms[1])[step]
        for network in (plain.encoder, plain.predictor):
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.clip_norm = clip_norm
        our_step(optimizer, step)
        reference_step(oracle, plain, step)
        torch.testing.assert_close(optimizer.grad_norm, torch.nn.utils.get_total_norm(grads.values()))
    assert_equal_runs(ours, plain)
    unclipped = make_model()
    for model, clip_norm in ((ours, float("inf")), (unclipped, None)):
        model.load_state_dict(make_model().state_dict())
        give_gradients(model, gradients_of_step(model, 0))
        AdamWEMA(model, lr=1e-3, clip_norm=clip_norm).step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), unclipped.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_skips_a_clipped_step_too(path):
    model = make_model()
    optimizer = AdamWEMA(model, lr=1e-2, ema_momentum=0.9, clip_norm=1.0)
    before, grads = copy.deepcopy(model), gradients_of_step(model, 0)
    grads["encoder.norm.bias"][3] = float("inf")
    give_gradients(model, grads)
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), before.encoder.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"clip_norm.*\b0\b"):
        AdamWEMA(model, clip_norm=0)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_leaves_all_but_the_target(path, dtype, value):
    model = make_model(dtype)
    optimizer = AdamWEMA(model, lr=1e-2, ema_momentum=0.9)
    give_gradients(model, gradients_of_step(model, 0))
    optimizer.step()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    grads = gradients_of_step(model, 1)
    grads["predictor.predictor_proj.bias"][5] = value
    give_gradients(model, grads)
    optimizer.step()
    assert optimizer.skipped == 1 and not optimizer.grad_norm.isfinite()
    for part in ("encoder", "predictor"):
        for a, b in zip(getattr(model, part).parameters(), getattr(before, part).parameters(), strict=True):
            assert torch.equal(a, b)
    for k, old, q in zip(
        model.target_encoder.parameters(), before.target_encoder.parameters(), before.encoder.parameters(), strict=True
    ):
        expected = old.detach().clone().mul_(0.9).add_(q.detach(), alpha=1 - 0.9)
        assert (k - expected).norm() <= 1e-6 * expected.norm()
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[key], state[index][key]) for key in values)
    for layer in model.modules():
        if isinstance(layer, Linear) and dtype == "bfloat16":
            assert torch.equal(shadow_of(layer.weight, torch.bfloat16), layer.weight.bfloat16())
    give_gradients(model, gradients_of_step(model, 2))
    optimizer.step()
    assert optimizer.skipped == 0 and optimizer.state_dict()["state"][0]["step"] == 2


def test_shadows_of_both_encoders_are_fresh_and_vouched_for(path):
    model = make_model("bfloat16")
    optimizer = AdamWEMA(model, lr=1e-2)
    for step in range(2):
        give_gradients(model, gradients_of_step(model, step))
        optimizer.step()
        layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
        for parameter in (p for layer in layers for p in layer.parameters()):
            shadow = shadow_of(parameter, torch.bfloat16)
            assert torch.equal(shadow, parameter.detach().bfloat16())
            assert shadow is shadow_of(parameter, torch.bfloat16), "the shadow was made anew"


def test_state_of_torch_loads_and_loads_back(path):
    """`opt` of the reference's checkpoints is the state of torch.optim.AdamW over the same groups."""
    plain = make_model()
    oracle = torch_adamw(plain)
    for step in range(3):
        give_gradients(plain, gradients_of_step(plain, step))
        reference_step(oracle, plain, step)
    ours = copy.deepcopy(plain)
    optimizer = AdamWEMA(ours, ema_momentum=0.75)
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    assert [group["ema_momentum"] for group in optimizer.param_groups] == [0.75] * 4
    for step in range(3, 6):
        grads = gradients_of_step(plain, step)
        give_gradients(ours, grads)
        give_gradients(plain, grads)
        our_step(optimizer, step)
        reference_step(oracle, plain, step)
    assert_equal_runs(ours, plain)
    back_model = copy.deepcopy(ours)
    back = torch_adamw(back_model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [{**group, "fused": None} for group in saved["param_groups"]]
    back.load_state_dict(saved)
    grads = gradients_of_step(plain, 6)
    for model in (back_model, plain):
        give_gradients(model, grads)
    reference_step(back, back_model, 6)
    reference_step(oracle, plain, 6)
    assert_equal_runs(back_model, plain)
    again = AdamWEMA(copy.deepcopy(ours))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["ema_momentum"] == optimizer.param_groups[0]["ema_momentum"]


def test_moments_saved_in_another_memory_order_still_serve(path):
    model, plain = make_model(), make_model()
    optimizer, oracle = AdamWEMA(model, lr=1e-3), torch_adamw(plain)
    for step in range(2):
        grads = gradients_of_step(model, step)
        give_gradients(model, grads)
        give_gradients(plain, grads)
        our_step(optimizer, step)
        reference_step(oracle, plain, step)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if state["exp_avg"].ndim == 2:
                state["exp_avg"] = state["exp_avg"].t().contiguous().t()
        optimizer.load_state_dict(saved)
    assert_equal_runs(model, plain)


def test_a_shadow_is_vouched_for_only_by_the_step_that_wrote_it(path):
    model = make_model("bfloat16")
    optimizer = AdamWEMA(model)
    give_gradients(model, gradients_of_step(model, 0))
    optimizer.step()
    weight = model.predictor.predictor_proj.weight
    with torch.no_grad():
        weight.add_(1)
    weight.grad = None
    optimizer.step()
    assert torch.equal(shadow_of(weight, torch.bfloat16), weight.detach().bfloat16())


def test_moved_parameters_and_exchanged_moments_are_noticed(path):
    models = make_model(), make_model()
    optimizers = AdamWEMA(models[0], lr=1e-2), AdamWEMA(models[1], lr=1e-2)
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, gradients_of_step(model, step))
            optimizer.step()
        # Nothing changes but where things lie, in the first model.
        weight = models[0].encoder.norm.weight
        if step == 0:
            weight.data = weight.data.clone()
        elif step == 1:
            optimizers[0].state[weight]["exp_avg"] = optimizers[0].state[weight]["exp_avg"].clone()
        elif step == 2:
            models[0].target_encoder.norm.weight.data = models[0].target_encoder.norm.weight.data.clone()
    assert_equal_runs(*models, tolerance=0)


def test_saving_a_sharded_state_does_not_move_the_target(path):
    """The functions of torch.distributed.checkpoint take a step to fill a state that is empty."""
    model = make_model()
    optimizer = AdamWEMA(model, ema_momentum=0.5)
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(1)
    before = copy.deepcopy(model)
    optimizer.init_state()
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    assert_equal_runs(model, before, tolerance=0)
    assert optimizer.state[model.encoder.norm.weight]["step"] == 0


def test_groups_may_be_added(path):
    model = make_model()
    optimizer = AdamWEMA(model, lr=1e-2)
    give_gradients(model, gradients_of_step(model, 0))
    optimizer.step()
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.5))


def test_options_it_does_not_have_are_refused():
    optimizer = AdamWEMA(make_model())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(saved)
    optimizer.init_state()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:1]
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0.*\[1, "):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"ema_momentum.*1\.5"):
        AdamWEMA(make_model(), ema_momentum=1.5)


def test_schedulers_closures_and_a_learning_rate_tensor(path):
    models = make_model(), make_model()
    ours = AdamWEMA(models[0], lr=torch.tensor(1e-2))
    theirs = torch.optim.AdamW(parameter_groups(models[1].encoder, models[1].predictor), lr=1e-2, weight_decay=0.04)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (ours, theirs)]

    def closure() -> float:
        give_gradients(models[0], gradients_of_step(models[0], 0))
        return 4.0

    for _ in range(2):
        assert ours.step(closure) == 4.0
        give_gradients(models[1], gradients_of_step(models[1], 0))
        theirs.step()
        ema_update(models[1].target_encoder, models[1].encoder, 0.99925)
        for schedule in schedules:
            schedule.step()
    assert_equal_runs(*models)


def test_gradients_that_lie_otherwise_than_their_parameters(path):
    models = make_model(), make_model()
    optimizers = AdamWEMA(models[0]), AdamWEMA(models[1])
    for model in models:
        give_gradients(model, gradients_of_step(model, 0))
    for parameter in models[0].parameters():
        if parameter.grad is not None and parameter.ndim == 2:
            parameter.grad = parameter.grad.t().contiguous().t()
    for optimizer in optimizers:
        optimizer.step()
    assert_equal_runs(*models)


def test_gradient_scaler_of_torch(path):
    """scaler.step hands over the scale and what it found; the target moves even where it found something."""
    models = make_model(), make_model()
    optimizers = AdamWEMA(models[0], ema_momentum=0.9), AdamWEMA(models[1], ema_momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step, bad in enumerate((False, True)):
        grads = gradients_of_step(models[0], step)
        if bad:
            grads["encoder.norm.bias"][0] = torch.inf
        give_gradients(models[0], {name: 1024.0 * 0.5**step * grad for name, grad in grads.items()})
        give_gradients(models[1], grads)
        # The scale goes down after a step that was skipped, so it is as it was in the loop above.
        scaler._scale.fill_(1024.0 * 0.5**step)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        assert optimizers[0].skipped == optimizers[1].skipped == bad
        assert_equal_runs(*models)


@pytest.mark.gpu
def test_a_captured_step_sees_new_values():
    model, plain = make_model("bfloat16").cuda(), make_model("bfloat16").cuda()
    optimizer, oracle = AdamWEMA(model, lr=1e-3), AdamWEMA(plain, lr=1e-3)
    static = {name: grad.cuda() for name, grad in gradients_of_step(make_model(), 0).items()}
    for name, parameter in model.named_parameters():
        parameter.grad = static.get(name)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        our_step(optimizer, 0)
    torch.cuda.current_stream().wait_stream(side)
    give_gradients(plain, static)
    our_step(oracle, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 5):
        grads = gradients_of_step(make_model(), step)
        for name, grad in grads.items():
            static[name].copy_(torch.full_like(grad, torch.nan) if step == 3 else grad)
        set_values(optimizer, step)
        optimizer.write_group_values()
        graph.replay()
        give_gradients(plain, static)
        our_step(oracle, step)
        assert optimizer.skipped == (step == 3)
    assert_equal_runs(model, plain)


@pytest.mark.gpu
def test_a_step_waits_for_nothing():
    model = make_model("bfloat16").cuda()
    optimizer = AdamWEMA(model)
    grads = {name: grad.cuda() for name, grad in gradients_of_step(make_model(), 0).items()}
    give_gradients(model, grads)
    our_step(optimizer, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            give_gradients(model, grads)
            our_step(optimizer, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
