"""A submitted job that is told, in its first start only, that its time is up."""

from __future__ import annotations

import signal

from tests.e2e.harness import signal_in_step
from vjepa_fast.cli.submit import TrainingJob


class EndingJob(TrainingJob):
    """Gets SIGUSR2 while step 4 is computed. What it leaves to be started again is a plain TrainingJob."""

    def __call__(self) -> int:
        signal_in_step(4, signal.SIGUSR2)
        return super().__call__()
