"""Metrics of steps, kept on the device until several are read back at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.distributed.processes import Processes
from vjepa_fast.train.speed.step_timer import StepTimes


@dataclass
class Pending:
    """A step whose metrics are still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    schedule: dict[str, float]
    """What the host knows of it, by names of columns of the log; `lr` is one."""
    num_clips: int
    times: StepTimes
    sample_ids: list[Tensor]


@dataclass
class StepMetrics:
    """Metrics of steps, in their order."""

    losses: list[float]
    """Over all processes."""
    norms: list[float]
    skipped: list[float]
    times: list[tuple[float, float]]
    """Seconds that the step waited for clips, and that it took itself."""
    rows: list[dict[str, Any]]
    """For the log."""

    @property
    def mean_loss(self) -> float:
        """Mean loss of the steps that were not skipped, or of all steps if all were."""
        taken = [loss for loss, skip in zip(self.losses, self.skipped, strict=True) if not skip] or self.losses
        return sum(taken) / len(taken)


def read_back(pending: Sequence[Pending], processes: Processes, ipe: int) -> StepMetrics:
    """The metrics of these steps; waits for the device and for the other processes.

    Args:
        ipe: steps of an epoch.
    """
    shares = torch.stack([p.loss for p in pending]).double().cpu()
    losses = (processes.sum_on_host(shares) / processes.world_size).tolist()
    norms = torch.stack([p.grad_norm for p in pending]).tolist()
    skipped = torch.stack([p.skipped for p in pending]).tolist()
    # The device is past the last of these steps now.
    times = [p.times.seconds() for p in pending]
    rows = [
        {
            "epoch": p.step // ipe + 1,
            "itr": p.step % ipe,
            "loss": loss,
            "iter-time(ms)": 1e3 * (wait + step),
            "gpu-time(ms)": 1e3 * step,
            "dataload-time(ms)": 1e3 * wait,
            "step": p.step,
            **p.schedule,
            "grad_norm": norm,
            "skipped": int(skip),
            "clips_per_s": p.num_clips / (wait + step),
        }
        for p, loss, norm, skip, (wait, step) in zip(pending, losses, norms, skipped, times, strict=True)
    ]
    return StepMetrics(losses, norms, skipped, times, rows)
