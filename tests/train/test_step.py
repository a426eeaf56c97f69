"""The training step: any optimizer works, shadows never go stale, bad gradients are skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops.linear import Linear, shadow_of
from vjepa_fast.optim.adamw_ema import AdamWEMA, ema_update, parameter_groups
from vjepa_fast.train.step import TrainStep


def config(dtype: str = "float32", **optimization) -> Config:
    return Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 48,
                "depth": 2,
                "num_heads": 2,
                "pred_embed_dim": 24,
                "pred_depth": 2,
                "pred_num_heads": 2,
            },
            "data": {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [4], "batch_size": 4},
            "optimization": {
                "epochs": 2,
                "ipe": 10,
                "warmup": 0,
                "lr": 1e-3,
                "final_lr": 1e-3,
                "ema": [0.9, 0.9],
                **optimization,
            },
            "train": {"dtype": dtype},
        }
    )


def make_model(cfg: Config) -> VJEPA:
    torch.manual_seed(0)
    return VJEPA.from_config(cfg)


def batch(step: int, cfg: Config) -> tuple[torch.Tensor, MaskBatch]:
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(0, 256, (4, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return clips, MaskSampler(cfg.mask, (2, 4, 4), seed=0)(step, range(4 * step, 4 * step + 4))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_torch_adamw_and_a_two_line_ema_train_the_same_model():
    cfg = config()
    ours, plain = make_model(cfg).double(), make_model(cfg).double()
    step = TrainStep(ours, cfg)
    optimizer = torch.optim.AdamW(parameter_groups(plain.encoder, plain.predictor), lr=1e-3, weight_decay=0.04)
    for index in range(4):
        clips, masks = batch(index, cfg)
        step(index, clips, masks)
        optimizer.zero_grad()
        plain(clips, masks).loss.backward()
        optimizer.step()
        for k, q in zip(plain.target_encoder.parameters(), plain.encoder.parameters(), strict=True):
            k.data.mul_(0.9).add_(q.data, alpha=0.1)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, atol=1e-12, rtol=1e-12)


def fresh_loss(model: VJEPA, clips: torch.Tensor, masks: MaskBatch) -> float:
    """Loss of a model built anew from the weights: it has no shadow to be stale."""
    other = VJEPA(model.cfg)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return other(clips, masks).loss.item()


@pytest.mark.parametrize("ema", ["foreach", "data in place", "data assigned"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shadows_are_fresh_under_any_optimizer_and_any_ema(dtype, ema):
    cfg = config(dtype)
    model = make_model(cfg)
    optimizer = torch.optim.AdamW(parameter_groups(model.encoder, model.predictor), lr=1e-2)
    before = weights(model)
    for index in range(3):
        clips, masks = batch(index, cfg)
        assert model(clips, masks).loss.item() == fresh_loss(model, clips, masks)
        optimizer.zero_grad()
        model(clips, masks).loss.backward()
        optimizer.step()
        pairs = zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True)
        if ema == "foreach":
            ema_update(model.target_encoder, model.encoder, 0.5)
        for k, q in pairs:
            if ema == "data in place":
                k.data.mul_(0.5).add_(q.data, alpha=0.5)
            elif ema == "data assigned":
                k.data = 0.5 * k.data + 0.5 * q.data
    clips, masks = batch(9, cfg)
    assert model(clips, masks).loss.item() == fresh_loss(model, clips, masks)
    for name, value in weights(model).items():
        unused = name.startswith("predictor.mask_tokens.1")
        assert torch.equal(value, before[name]) == unused, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vouched_shadows_are_those_of_the_masters(dtype):
    cfg = config(dtype)
    model = make_model(cfg)
    step = TrainStep(model, cfg)
    low = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    for index in range(3):
        clips, masks = batch(index, cfg)
        step(index, clips, masks)
        for module in model.modules():
            if isinstance(module, Linear):
                assert torch.equal(shadow_of(module.weight, low), module.weight.detach().to(low))
    clips, masks = batch(9, cfg)
    assert model(clips, masks).loss.item() == fresh_loss(model, clips, masks)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.encoder.blocks[0].attn.qkv.weight.mul_(2)
    assert copied(clips, masks).loss.item() == fresh_loss(copied, clips, masks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gradients_are_near_full_precision(dtype):
    cfg, low_cfg = config(), config(dtype)
    full, low = make_model(cfg), make_model(low_cfg)
    clips, masks = batch(0, cfg)
    full(clips, masks).loss.backward()
    low(clips, masks).loss.backward()
    grads = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (full, low)]
    assert grads[1].dtype == torch.float32
    assert (grads[1] - grads[0]).norm() <= (0.05 if dtype == "bfloat16" else 0.01) * grads[0].norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loss_falls_on_one_batch(dtype):
    cfg = config(dtype, ema=[1.0, 1.0], lr=3e-3)
    step = TrainStep(make_model(cfg), cfg)
    clips, masks = batch(0, cfg)
    losses = [float(step(index, clips, masks).loss) for index in range(12)]
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_non_finite_gradients_skip_the_update_but_not_the_ema(dtype):
    cfg = config(dtype)
    model = make_model(cfg)
    step = TrainStep(model, cfg)
    # The scale of fp16 starts too high and comes down over the first steps.
    while step(0, *batch(0, cfg)).skipped:
        assert step.scaler is not None and step.scaler.get_scale() > 1
    before, moments = weights(model), copy.deepcopy(step.optimizer.state_dict()["state"])
    scale = step.scaler.get_scale() if step.scaler else None
    hook = model.predictor.predictor_proj.bias.register_hook(lambda grad: grad * float("nan"))
    result = step(1, *batch(1, cfg))
    hook.remove()
    assert result.skipped == 1
    after = weights(model)
    for name, value in after.items():
        if name.startswith("target_encoder"):
            source = before[name.replace("target_encoder", "encoder")]
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * source)
        else:
            assert torch.equal(value, before[name]), name
    for index, state in step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], moments[index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    if scale is not None:
        assert step.scaler.get_scale() == scale / 2
    assert step(2, *batch(2, cfg)).skipped == 0


@pytest.mark.parametrize("micro", [2, 3, 4])
def test_gradient_accumulation_is_the_same_step(micro):
    cfg, split = config(), config(grad_accumulation=micro)
    one, many = make_model(cfg).double(), make_model(split).double()
    results = [TrainStep(model, c)(0, *batch(0, cfg)) for model, c in ((one, cfg), (many, split))]
    torch.testing.assert_close(results[0].loss, results[1].loss, atol=1e-12, rtol=1e-12)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(many)[name], value, atol=1e-9, rtol=1e-9)


def test_public_optimizer_by_itself():
    cfg = config()
    model = make_model(cfg)
    optimizer = AdamWEMA(model, lr=1e-3, ema_momentum=0.5)
    clips, masks = batch(0, cfg)
    target = weights(model.target_encoder)
    model(clips, masks).loss.backward()
    optimizer.step()
    for name, value in weights(model.target_encoder).items():
        torch.testing.assert_close(value, 0.5 * target[name] + 0.5 * weights(model.encoder)[name])
    decayed = {id(p) for group in optimizer.param_groups if not group.get("WD_exclude") for p in group["params"]}
    for name, p in model.named_parameters():
        if not name.startswith("target_encoder"):
            assert (id(p) in decayed) == (p.ndim > 1 and "bias" not in name), name


def test_a_model_with_another_loss_is_refused() -> None:
    cfg = config()
    squared = cfg.model_copy(update={"loss": cfg.loss.model_copy(update={"loss_exp": 2.0, "reg_coeff": 0.5})})
    with pytest.raises(ValueError, match=r"loss_exp.*1\.0.*2\.0.*reg_coeff.*0\.0.*0\.5"):
        TrainStep(VJEPA.from_config(cfg), squared)
    assert TrainStep(VJEPA.from_config(squared), squared).model.loss_options["reg_coeff"] == 0.5


def test_weights_of_the_context_loss_stay_exact_when_a_model_is_cast_or_moved() -> None:
    dense = {"predict_all": True, "lambda_value_vid": 0.3, "lambda_value_img": 0.7}
    cfg = config().model_copy(deep=True).model_dump(mode="json")
    cfg["model"] |= {"n_output_distillation": 4, "depth": 12}
    cfg["loss"] |= dense
    del cfg["model"]["return_all_tokens"]
    model = VJEPA.from_config(Config.model_validate(cfg))
    for cast in (model.to(torch.bfloat16), model.half(), model.to("meta").to_empty(device="cpu").float()):
        assert cast.context_scale.dtype == torch.float64 and cast.context_scale.device.type == "cpu"
    assert "context_scale" not in model.state_dict()
    fresh = VJEPA.from_config(Config.model_validate(cfg)).to(torch.bfloat16)
    assert fresh.context_scale.tolist() == [0.3, 0.7]
