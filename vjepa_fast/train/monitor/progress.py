"""Shows progress: a bar in a terminal, a line every N steps in a log file."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from rich.console import Console

from vjepa_fast.common.progress_bar import ProgressBar


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
        self.began = time.perf_counter()
        self.bar = ProgressBar("step", total, start, console, live=True) if enabled else None

    def advance(self, done: int) -> None:
        """Move the bar to `done` finished steps."""
        if self.bar is not None:
            self.bar.advance(done)

    def report(
        self, done: int, *, loss: float, lr: float, clips_per_s: float, data_wait: float, explained: float | None = None
    ) -> None:
        """Show the figures of the last steps.

        Args:
            done: finished steps.
            data_wait: share of the time spent waiting for clips, 0 to 1.
            explained: share of the targets' variance that the predictions explain; None: not known.
        """
        if self.bar is None:
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
        text = fitting(figures, self.bar.room) if self.bar.is_bar else "  ".join(figures.values())
        self.bar.show(done, text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.close()
