"""What is told at the end of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vjepa_fast.train.monitor.progress import RunConsole


@dataclass
class RunSummary:
    """How a run ended."""

    exit_code: int
    """0 finished, 1 output closed or no clips, 130 interrupted, 143 ended by SIGTERM; all but 0 after a checkpoint was
    written."""
    step: int
    """Steps done, over all restarts."""
    loss: float
    """Mean of the last steps logged; that of the checkpoint if no step was left to do."""
    clips_per_s: float
    """Over all processes, after the first steps; nan if no step was left to do."""
    data_wait: float
    """Share of that time that the first process waited for clips, 0 to 1 (vjepa_fast.train.speed.step_timer)."""
    folder: Path

    @property
    def how(self) -> str:
        """It ended."""
        return {0: "finished", 1: "stopped", 130: "interrupted", 143: "ended by SIGTERM"}[self.exit_code]

    def tell(self, console: RunConsole, total_steps: int, checkpoint: Path | None) -> None:
        """Print it.

        Args:
            total_steps: of the schedules, which the run may not have reached.
            checkpoint: the newest of the run; None: none was written.
        """
        figures = [f"loss {self.loss:.4f}"] if math.isfinite(self.loss) else []
        if math.isfinite(self.clips_per_s):
            figures += [f"{self.clips_per_s:.1f} clips/s", f"data wait {100 * self.data_wait:.1f} %"]
        console.print(
            f"{self.how} at step {self.step} of {total_steps}{': ' if figures else ''}{', '.join(figures)}"
            + ("" if checkpoint is None else f"\ncheckpoint {checkpoint}"),
            highlight=False,
            soft_wrap=True,
        )
