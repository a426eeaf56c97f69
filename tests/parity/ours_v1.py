"""The same runs as meta_v1_reference.run, with vjepa_fast."""

from __future__ import annotations

import torch

from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.noised_targets import Noise
from vjepa_fast.train.step import TrainStep

from . import ours
from .v1_cases import V1Case, repeated, v1_batch, v1_noise


def noise_of(case: V1Case, step: int, masks: MaskBatch) -> Noise:
    """Of all masks, as they are packed."""
    counts = masks.target_lengths[:: masks.batch_size]
    levels, normal = zip(*(v1_noise(case, step, mask, count) for mask, count in enumerate(counts)), strict=True)
    return Noise(torch.cat(levels), torch.cat([x.flatten(0, 1) for x in normal]))


def run(case: V1Case, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> ours.OurRun:
    """`case.num_steps` steps from `weights`."""
    model, cfg = ours.build(case, dtype)
    ours.load(model, weights)
    train_step = TrainStep(model, cfg)
    steps = []
    for step in range(case.num_steps):
        model.predictor.draw_noise = lambda masks, step=step: noise_of(case, step, masks)  # type: ignore[method-assign]
        steps.append(ours.train(model, train_step, repeated(case, v1_batch(case, step)), step))
    return ours.OurRun(steps, ours.weights_of(model))
