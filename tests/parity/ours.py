"""The same runs as the references', with vjepa_fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import vjepa_fast as vf
from vjepa_fast.config.schema import Config
from vjepa_fast.models.noised_targets import Noise
from vjepa_fast.train.step import TrainStep

from .cases import Batch, Case, make_batch
from .cases_v1 import V1Case, repeated, v1_batch, v1_noise
from .cases_v21 import IMAGE_SHARE, DenseCase

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
    return train_on(model, train_step, *inputs(batch), step)


def train_on(
    model: vf.VJEPA, train_step: TrainStep, clips: list[torch.Tensor], masks: list[vf.MaskBatch], step: int
) -> OurStep:
    """The same with the arguments of `VJEPA.forward`."""
    # The loss of V-JEPA 2.1 changes from step to step.
    train_step.set_schedules(step)
    model.zero_grad(set_to_none=True)
    loss = model(clips, masks).loss
    loss.backward()
    gradients = gradients_of(model)
    model.zero_grad(set_to_none=True)
    result = train_step(step, clips, masks)
    assert float(result.loss) == loss.item()
    assert not result.skipped
    return OurStep(loss.item(), gradients, result.lr, result.weight_decay, result.momentum)


Inputs = Callable[[vf.VJEPA, Any, int], tuple[list[torch.Tensor], list[vf.MaskBatch]]]
"""What `VJEPA.forward` takes, of a model, a case and a step; it may prepare the model for the step, too."""


def v1_inputs(model: vf.VJEPA, case: V1Case, step: int) -> tuple[list[torch.Tensor], list[vf.MaskBatch]]:
    """A video's masks for each of its clips; the noise of a predictor without mask tokens is that of v1_noise."""
    model.predictor.draw_noise = lambda masks: noise_of(case, step, masks)  # type: ignore[method-assign]
    return inputs(repeated(case, v1_batch(case, step)))


def noise_of(case: V1Case, step: int, masks: vf.MaskBatch) -> Noise:
    """Of all masks, as they are packed."""
    counts = masks.target_lengths[:: masks.batch_size]
    levels, normal = zip(*(v1_noise(case, step, mask, count) for mask, count in enumerate(counts)), strict=True)
    return Noise(torch.cat(levels), torch.cat([x.flatten(0, 1) for x in normal]))


def v2_inputs(model: vf.VJEPA, case: Case, step: int) -> tuple[list[torch.Tensor], list[vf.MaskBatch]]:
    """The batch as it is."""
    return inputs(make_batch(case, step))


def v21_inputs(model: vf.VJEPA, case: DenseCase, step: int) -> tuple[list[torch.Tensor], list[vf.MaskBatch]]:
    """With both kinds of clips, each has its share of the loss."""
    clips, masks = inputs(make_batch(case, step))
    masks = [replace(m, mask_token=0) for m in masks]
    if len(masks) == 2:
        masks = [masks[0].scaled(1 - IMAGE_SHARE), masks[1].scaled(IMAGE_SHARE)]
    return clips, masks


def run(case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype, inputs_of: Inputs) -> OurRun:
    """`case.num_steps` steps from `weights`."""
    model, cfg = build(case, dtype)
    load(model, weights)
    train_step = TrainStep(model, cfg)
    steps = [train_on(model, train_step, *inputs_of(model, case, step), step) for step in range(case.num_steps)]
    return OurRun(steps, weights_of(model))
