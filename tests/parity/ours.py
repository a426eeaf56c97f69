"""The same runs as meta_reference.run, with vjepa_fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import vjepa_fast as vf
from vjepa_fast.config.schema import Config
from vjepa_fast.train.step import TrainStep

from .cases import Batch, Case, make_batch

PARTS = ("encoder", "predictor", "target_encoder")


@dataclass
class OurStep:
    loss: float
    gradients: dict[str, torch.Tensor | None]
    lr: float
    weight_decay: float
    momentum: float


@dataclass
class OurRun:
    steps: list[OurStep]
    weights: dict[str, torch.Tensor]


def build(case: Case, dtype: torch.dtype = torch.float32) -> tuple[vf.VJEPA, Config]:
    """The model of `case` in train mode and its config."""
    cfg = Config.model_validate(case.config())
    return vf.VJEPA.from_config(cfg).to(dtype), cfg


def weights_of(model: vf.VJEPA) -> dict[str, torch.Tensor]:
    """A copy of the state: `encoder.<key>`, `predictor.<key>`, `target_encoder.<key>`."""
    return {
        f"{part}.{key}": value.detach().clone()
        for part in PARTS
        for key, value in getattr(model, part).state_dict().items()
    }


def load(model: vf.VJEPA, weights: dict[str, torch.Tensor]) -> None:
    """Load a state as `weights_of` returns it: strictly, but position tables that it lacks stay as they are."""
    for part in PARTS:
        module = getattr(model, part)
        own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        tables = {k: v for k, v in module.state_dict().items() if k.endswith("pos_embed") and k not in own}
        module.load_state_dict({**tables, **own}, strict=True)


def inputs(batch: Batch) -> tuple[list[torch.Tensor], list[vf.MaskBatch]]:
    """The batch as `VJEPA.forward` takes it."""
    masks = [
        vf.MaskBatch.from_meta(enc, pred, grid=grid)
        for enc, pred, grid in zip(batch.masks_enc, batch.masks_pred, batch.grids, strict=True)
    ]
    return batch.clips, masks


def gradients_of(model: vf.VJEPA) -> dict[str, torch.Tensor | None]:
    """A copy of the gradients of all trained parameters, None where there is none."""
    return {
        f"{part}.{key}": None if value.grad is None else value.grad.clone()
        for part in PARTS[:2]
        for key, value in getattr(model, part).named_parameters()
        if value.requires_grad
    }


def train(model: vf.VJEPA, train_step: TrainStep, batch: Batch, step: int) -> OurStep:
    """One step, with the gradients of its loss taken just before it, at the same weights."""
    clips, masks = inputs(batch)
    model.zero_grad(set_to_none=True)
    loss = model(clips, masks).loss
    loss.backward()
    gradients = gradients_of(model)
    model.zero_grad(set_to_none=True)
    result = train_step(step, clips, masks)
    assert float(result.loss) == loss.item()
    assert not result.skipped
    return OurStep(loss.item(), gradients, result.lr, result.weight_decay, result.momentum)


def run(case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> OurRun:
    """`case.num_steps` steps from `weights`."""
    model, cfg = build(case, dtype)
    load(model, weights)
    train_step = TrainStep(model, cfg)
    steps = [train(model, train_step, make_batch(case, step), step) for step in range(case.num_steps)]
    return OurRun(steps, weights_of(model))
