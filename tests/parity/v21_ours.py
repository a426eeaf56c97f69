"""The same runs as v21_reference.run, with vjepa_fast."""

from __future__ import annotations

from dataclasses import replace

import torch

import vjepa_fast as vf
from vjepa_fast.train.step import TrainStep

from . import ours
from .cases import Batch, make_batch
from .v21_cases import IMAGE_SHARE, DenseCase


def inputs(batch: Batch) -> tuple[list[torch.Tensor], list[vf.MaskBatch]]:
    """The batch as `VJEPA.forward` takes it: with both kinds, each has its share of the loss."""
    clips, masks = ours.inputs(batch)
    masks = [replace(m, mask_token=0) for m in masks]
    if len(masks) == 2:
        masks = [masks[0].scaled(1 - IMAGE_SHARE), masks[1].scaled(IMAGE_SHARE)]
    return clips, masks


def run(case: DenseCase, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> ours.OurRun:
    """`case.num_steps` steps from `weights`; gradients are those of the loss just before a step."""
    model, cfg = ours.build(case, dtype)
    ours.load(model, weights)
    train_step = TrainStep(model, cfg)
    steps = []
    for number in range(case.num_steps):
        clips, masks = inputs(make_batch(case, number))
        train_step.set_schedules(number)
        model.zero_grad(set_to_none=True)
        loss = model(clips, masks).loss
        loss.backward()
        gradients = ours.gradients_of(model)
        model.zero_grad(set_to_none=True)
        result = train_step(number, clips, masks)
        assert float(result.loss) == loss.item()
        assert not result.skipped
        steps.append(ours.OurStep(loss.item(), gradients, result.lr, result.weight_decay, result.momentum))
    return ours.OurRun(steps, ours.weights_of(model))
