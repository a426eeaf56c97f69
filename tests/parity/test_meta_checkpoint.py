"""A checkpoint of the reference resumes here, one of ours resumes there, and both go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vjepa_fast.checkpoints import meta_format
from vjepa_fast.train.step import TrainStep

from . import ours, reference_v2
from .cases import CASES, OPTIMIZATION, Case, make_batch, recipe_weights, relative_difference, zero_gradient
from .reference import ignore_sdp_warning

pytestmark = [reference_v2.needs_reference, ignore_sdp_warning]

# An epoch of these runs has two steps; a mask token that no batch uses has no optimizer state.
BEFORE = OPTIMIZATION["ipe"]
SOME_CASES = pytest.mark.parametrize("name", ["mixed_frames", "sincos", "swiglu"])


class DataParallelNames(nn.Module):
    """Gives the keys of a state_dict the prefix that DistributedDataParallel gives them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def their_checkpoint(triple: reference_v2.Triple, training: reference_v2.Training, epoch: int) -> dict[str, Any]:
    """What the reference's training script saves in an fp32 run."""
    networks = {part: DataParallelNames(module).state_dict() for part, module in triple.parts()}
    return {
        **networks,
        "opt": training.optimizer.state_dict(),
        "scaler": None,
        "epoch": epoch,
        "loss": 1.25,
        "batch_size": 3,
        "world_size": 1,
        "lr": OPTIMIZATION["lr"],
    }


def their_training(case: Case) -> tuple[reference_v2.Triple, reference_v2.Training]:
    triple = reference_v2.build(case, torch.float64)
    return triple, reference_v2.Training(triple, case)


def our_training(case: Case) -> tuple[Any, TrainStep]:
    model, cfg = ours.build(case, torch.float64)
    return model, TrainStep(model, cfg)


def start(case: Case) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(value.shape) for name, value in reference_v2.build(case).weights().items()}
    return recipe_weights(shapes, case.seed)


def moments(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> dict[str, dict[str, torch.Tensor]]:
    return {names[p]: state for p, state in optimizer.state.items() if state}


def our_names(model: Any) -> dict[torch.Tensor, str]:
    return {value: f"{part}.{key}" for part in ours.PARTS for key, value in getattr(model, part).named_parameters()}


def their_names(triple: reference_v2.Triple) -> dict[torch.Tensor, str]:
    return {
        value: f"{part}.{key}" for part, module in triple.parts() for key, value in module.backbone.named_parameters()
    }  # type: ignore[union-attr]


def assert_same_state(
    case: Case, model: Any, train_step: TrainStep, triple: reference_v2.Triple, training: reference_v2.Training
) -> None:
    """Weights and moments are equal to the bit."""
    mine, theirs = ours.weights_of(model), triple.weights()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    mine_moments = moments(train_step.optimizer, our_names(model))
    their_moments = moments(training.optimizer, their_names(triple))
    assert mine_moments.keys() == their_moments.keys()
    unused = {f"predictor.mask_tokens.{i}" for i in range(len(case.frames), case.num_mask_tokens)}
    assert not unused & their_moments.keys() and len(their_moments) > 50
    for name, state in their_moments.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine_moments[name][key], state[key]), (name, key)
        assert state["exp_avg"].any(), name


def assert_same_continuation(
    case: Case, model: Any, train_step: TrainStep, training: reference_v2.Training, triple: reference_v2.Triple
) -> None:
    """The next steps: losses, gradients, schedules, and the weights after them."""
    for step in range(BEFORE, BEFORE + 2):
        batch = make_batch(case, step)
        expected, found = training.step(batch), ours.train(model, train_step, batch, step)
        assert found.loss == pytest.approx(expected.loss, rel=1e-10)
        assert (found.lr, found.weight_decay) == pytest.approx((expected.lr, expected.weight_decay), rel=1e-12)
        for name, gradient in expected.gradients.items():
            mine = found.gradients[name]
            if gradient is None:
                assert mine is None or not mine.any()
                continue
            assert mine is not None
            difference = relative_difference(zero_gradient(name, case, mine), zero_gradient(name, case, gradient))
            assert difference <= 1e-9, name
    mine_weights = ours.weights_of(model)
    for name, value in triple.weights().items():
        assert (mine_weights[name] - value).abs().max().item() <= 1e-9, name


@SOME_CASES
def test_theirs_resumes_here(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    triple, training = their_training(case)
    triple.load(start(case))
    for step in range(BEFORE):
        training.step(make_batch(case, step))
    torch.save(their_checkpoint(triple, training, epoch=1), tmp_path / "latest.pt")

    model, train_step = our_training(case)
    info = meta_format.load_checkpoint(tmp_path / "latest.pt", model, train_step.optimizer)
    assert info == {"epoch": 1, "loss": 1.25, "batch_size": 3, "world_size": 1, "lr": OPTIMIZATION["lr"]}
    assert_same_state(case, model, train_step, triple, training)
    assert_same_continuation(case, model, train_step, training, triple)


@SOME_CASES
@pytest.mark.parametrize("is_anneal", [False, True])
def test_ours_resumes_there(name: str, is_anneal: bool, tmp_path: Path) -> None:
    case = CASES[name]
    model, train_step = our_training(case)
    ours.load(model, start(case))
    for step in range(BEFORE):
        ours.train(model, train_step, make_batch(case, step), step)
    meta_format.save_checkpoint(
        tmp_path / "latest.pt",
        model,
        train_step.optimizer,
        epoch=1,
        loss=1.25,
        batch_size=3,
        world_size=1,
        lr=OPTIMIZATION["lr"],
        extra={"step": BEFORE},
    )

    triple, training = their_training(case)
    *_, epoch = reference_v2.modules().utils.load_checkpoint(
        r_path=str(tmp_path / "latest.pt"),
        encoder=DataParallelNames(triple.encoder),
        predictor=DataParallelNames(triple.predictor),
        target_encoder=DataParallelNames(triple.target_encoder),
        opt=training.optimizer,
        scaler=None,
        is_anneal=is_anneal,
    )
    assert epoch == (0 if is_anneal else 1)
    training.skip(BEFORE)
    assert_same_state(case, model, train_step, triple, training)
    assert_same_continuation(case, model, train_step, training, triple)


def test_layout_is_theirs(tmp_path: Path) -> None:
    """The same entries and the same keys in the same order, so that other readers of their files read ours."""
    case = CASES["mixed_frames"]
    triple, training = their_training(case)
    triple.load(start(case))
    training.step(make_batch(case, 0))
    expected = their_checkpoint(triple, training, epoch=1)
    model, train_step = our_training(case)
    ours.load(model, start(case))
    ours.train(model, train_step, make_batch(case, 0), 0)
    meta_format.save_checkpoint(
        tmp_path / "latest.pt",
        model,
        train_step.optimizer,
        epoch=1,
        loss=1.25,
        batch_size=3,
        world_size=1,
        lr=OPTIMIZATION["lr"],
    )
    found = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for part in ours.PARTS:
        assert list(found[part]) == list(expected[part]), part
    assert found["opt"]["state"].keys() == expected["opt"]["state"].keys()
    for own, theirs in zip(found["opt"]["param_groups"], expected["opt"]["param_groups"], strict=True):
        assert own["params"] == theirs["params"]
        assert own.keys() == theirs.keys()


def test_scaler_state_of_a_bf16_run_loads_there(tmp_path: Path) -> None:
    """The reference keeps a gradient scaler with bf16; ours has none but saves a state that fits."""
    model, cfg = ours.build(CASES["rope"])
    model.cfg.dtype = "bfloat16"
    train_step = TrainStep(model, cfg)
    meta_format.save_checkpoint(
        tmp_path / "latest.pt", model, train_step.optimizer, epoch=0, loss=0.0, batch_size=3, world_size=1, lr=1e-3
    )
    triple = reference_v2.build(CASES["rope"])
    training = reference_v2.Training(triple, CASES["rope"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    reference_v2.modules().utils.load_checkpoint(
        r_path=str(tmp_path / "latest.pt"),
        encoder=DataParallelNames(triple.encoder),
        predictor=DataParallelNames(triple.predictor),
        target_encoder=DataParallelNames(triple.target_encoder),
        opt=training.optimizer,
        scaler=scaler,
    )
    assert scaler.get_scale() == 65536.0
