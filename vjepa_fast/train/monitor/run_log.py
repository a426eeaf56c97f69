"""What a run writes down and shows while it trains: the files of its log, the progress line, its speed."""

from __future__ import annotations

from collections.abc import Sequence
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
