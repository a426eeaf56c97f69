"""The log of a run: its files, the progress line, its speed, and the summary at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_fast.distributed.processes import Processes
from vjepa_fast.train.monitor.metrics import MetricsLog
from vjepa_fast.train.monitor.pending_metrics import Pending, StepMetrics
from vjepa_fast.train.monitor.progress import ProgressReport, RunConsole, Speed


class RunLog:
    """Log files, progress line and mean speed of one process.

    Args:
        folder: run folder.
        processes: of the run.
        console: where progress is shown; the first process shows it.
        start, last: steps that the run begins and ends at.
        tensorboard: also write TensorBoard events.

    Raises:
        ConfigError, UserError: as MetricsLog.
    """

    def __init__(
        self, folder: Path, processes: Processes, console: RunConsole, start: int, last: int, tensorboard: bool
    ) -> None:
        self.files = MetricsLog(folder, processes.rank, start, tensorboard)
        self.progress = ProgressReport(last, start, console, processes.is_first)
        self.speed = Speed()

    def write(
        self, step: int, pending: Sequence[Pending], steps: StepMetrics, extra: dict[str, float]
    ) -> dict[str, Any]:
        """Write down and show some steps.

        Args:
            step: steps done.
            pending, steps: these steps, and what was read back of them.
            extra: further values of the last of them.

        Returns:
            The last row, as metrics.jsonl holds it.
        """
        for p, (wait, seconds) in zip(pending, steps.times, strict=True):
            self.speed.add(p.num_clips, wait + seconds, wait)
        row = self.files.write(steps.rows, extra)
        took = sum(map(sum, steps.times))
        self.progress.report(
            step,
            loss=steps.mean_loss,
            lr=pending[-1].schedule["lr"],
            clips_per_s=sum(p.num_clips for p in pending) / took,
            data_wait=sum(wait for wait, _ in steps.times) / took,
            explained=extra.get("explained"),
        )
        return row

    def close(self) -> None:
        """Leave the terminal as it was and close the files."""
        self.progress.close()
        self.files.close()


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
        """The outcome for people, such as `interrupted`."""
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
