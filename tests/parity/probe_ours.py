"""Our grid of heads as one probe, or one among others, in the cases of probe_cases."""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.evaluation.attentive_probe import GridAdamW, HeadSetting, loss_of
from vjepa_fast.evaluation.head_grid import HeadGrid
from vjepa_fast.models.attentive import AttentiveClassifier

from .probe_cases import NUM_STEPS, STEPS_PER_EPOCH, ProbeCase, ProbeRun

V1_FINAL_DECAY = 1e-6


def weights(case: ProbeCase) -> dict[str, Tensor]:
    """Of the start."""
    probe = AttentiveClassifier(case.dim, case.num_heads, case.num_classes, case.depth)
    return case.weights({name: tuple(value.shape) for name, value in probe.state_dict().items()})


def run(case: ProbeCase, start: dict[str, Tensor], dtype: torch.dtype) -> ProbeRun:
    """Three steps, as the middle one of three heads that differ."""
    states = [{name: value.to(dtype) * (1 + 0.1 * (head - 1)) for name, value in start.items()} for head in range(3)]
    grid = HeadGrid(states, case.num_heads)
    given = case.optimization
    setting = HeadSetting(
        given["lr"],
        given["weight_decay"],
        given["start_lr"],
        given["final_lr"],
        given.get("final_weight_decay", V1_FINAL_DECAY),
        given["warmup"],
    )
    other = HeadSetting(7e-4, 0.3)
    optimizer = GridAdamW(grid, decay_all=case.version == 2, clip_norm=1.0 if case.version == 1 else None)
    steps = []
    for number in range(NUM_STEPS):
        rates = [
            one.at(number + 1, given["num_epochs"] * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
            for one in (other, setting, other)
        ]
        outputs = grid(case.features(number).to(dtype))
        losses = loss_of(outputs, case.labels(number))
        losses.sum().backward()
        gradients = {name: value.grad[1].clone() for name, value in grid.parameters.items() if value.grad is not None}
        steps.append((losses[1].item(), outputs[1].detach(), gradients, *rates[1]))
        optimizer.step(*torch.tensor(rates, dtype=torch.float64).T)
    return ProbeRun(steps, grid.state_dict(1))
