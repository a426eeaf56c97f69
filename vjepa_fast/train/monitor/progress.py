"""Shows progress: a bar in a terminal, a line every N steps in a log file."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Speed:
    """Clips per second and data-wait share, leaving out the first steps, which warm up, if there are others."""

    def __init__(self, warmup: int = 3) -> None:
        self.skip = warmup
        self.num_clips, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, num_clips: int, seconds: float, waited: float) -> None:
        """A step: how long it took, and how much of that it waited for clips."""
        if self.skip == 0:
            self.num_clips, self.seconds, self.waited = 0, 0.0, 0.0
        self.skip -= 1
        self.num_clips += num_clips
        self.seconds += seconds
        self.waited += waited

    @property
    def clips_per_s(self) -> float:
        return self.num_clips / self.seconds if self.seconds else float("nan")

    @property
    def data_wait(self) -> float:
        return self.waited / self.seconds if self.seconds else float("nan")


class RunConsole(Console):
    """A console that falls silent when its reader goes away (`| head`), where rich's own ends the program.

    Attributes:
        closed: the reader has gone.
    """

    closed = False

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.closed = self.quiet = True
        # What Python's own buffer still holds goes nowhere, or the end of the program would complain about it.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


_DROPPED = ("lr", "data wait", "explained", "speed")
"""What a narrow terminal goes without, first to last; steps, loss and the time left are always there."""

_NARROWEST_BAR = 8
"""Columns, with the spaces beside it."""


def fitting(figures: dict[str, str], width: int) -> str:
    """The figures side by side, without those of _DROPPED that do not fit.

    Args:
        figures: name -> text, in their order.
        width: columns there are.
    """
    kept = dict(figures)
    for name in _DROPPED:
        if len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())


class ProgressReport:
    """Shows loss, lr, clips/s, data-wait share and time left.

    Args:
        total: steps of the run.
        start: step it begins at.
        console: where to.
        enabled: false shows nothing (all processes but the first).
    """

    def __init__(self, total: int, start: int, console: Console, enabled: bool = True) -> None:
        self.total = total
        self.start = start
        self.console = console
        self.enabled = enabled
        self.began = time.perf_counter()
        self.bar: Progress | None = None
        if enabled and console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=console,
                refresh_per_second=4,
            )
            self.task = self.bar.add_task("starting", total=total, completed=start)
            self.bar.start()

    def advance(self, done: int) -> None:
        """Move the bar to `done` finished steps."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def report(
        self, done: int, *, loss: float, lr: float, clips_per_s: float, data_wait: float, explained: float | None = None
    ) -> None:
        """Show the figures of the last steps.

        Args:
            done: finished steps.
            data_wait: share of the time spent waiting for clips, 0 to 1.
            explained: share of the targets' variance that the predictions explain; None: not known.
        """
        if not self.enabled:
            return
        pace = (time.perf_counter() - self.began) / max(1, done - self.start)
        left = timedelta(seconds=round(pace * (self.total - done)))
        figures = {"loss": f"loss {loss:.4f}"}
        if explained is not None:
            figures["explained"] = f"explained {100 * explained:.0f} %"
        figures |= {
            "lr": f"lr {lr:.2e}",
            "speed": f"{clips_per_s:.1f} clips/s",
            "data wait": f"data wait {100 * data_wait:.0f} %",
            "eta": f"eta {left}",
        }
        if self.bar is not None:
            room = self.console.width - len(f"step {self.total}/{self.total}") - _NARROWEST_BAR
            self.bar.update(self.task, description=fitting(figures, room), completed=done)
        else:
            self.console.print(
                f"step {done}/{self.total}  {'  '.join(figures.values())}", highlight=False, soft_wrap=True
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
