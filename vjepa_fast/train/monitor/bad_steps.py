"""Records bad steps: non-finite gradients and loss spikes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vjepa_fast.common.atomic import disk_errors

_MEMORY = 0.98
"""Share of the mean loss that a new one leaves."""
_NUM_BEFORE = 20
"""Good steps before a loss can be far above their mean."""


class BadSteps:
    """Counts bad steps in a row and lists all of them, with the clips, in bad_steps_r<rank>.jsonl.

    Args:
        folder: run folder.
        rank: of this process, whose clips are listed.
        spike_factor: a loss above this many times the mean of the good ones before is bad; None: a finite one never is.
    """

    def __init__(self, folder: Path, rank: int, spike_factor: float | None) -> None:
        self.path = folder / f"bad_steps_r{rank}.jsonl"
        self.in_a_row = 0
        self._spike_factor = spike_factor
        self._mean, self._num_good = 0.0, 0

    def observe(self, step: int, loss: float, grad_norm: float, skipped: bool, sample_ids: Sequence[Tensor]) -> None:
        """A step that is done.

        Args:
            step: counts from 0.
            loss: of all processes.
            grad_norm: likewise.
            skipped: its gradients were not finite.
            sample_ids: numbers of this process's clips, [B] int64 for each group.

        Raises:
            UserError: the file cannot be written.
        """
        spike = (
            self._spike_factor is not None and self._num_good >= _NUM_BEFORE and loss > self._spike_factor * self._mean
        )
        if not skipped and not spike and math.isfinite(loss):
            # The plain mean at first, so that early losses do not count for long.
            memory = min(_MEMORY, self._num_good / (self._num_good + 1))
            self._mean, self._num_good = memory * self._mean + (1 - memory) * loss, self._num_good + 1
            self.in_a_row = 0
            return
        self.in_a_row += 1
        row = {
            "step": step,
            "loss": loss if math.isfinite(loss) else str(loss),
            "mean_loss": self._mean,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
            "skipped": skipped,
            "sample_ids": [number for group in sample_ids for number in group.tolist()],
        }
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
