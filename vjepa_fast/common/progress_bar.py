"""How far counted work is: a bar for a person at a terminal, a line now and then for a log file."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FRAMES = 0.2
_NARROWEST_BAR = 8
"""Columns, with the spaces beside it."""


class ProgressBar:
    """`LABEL done/total  text`, shown when it is told to.

    Args:
        label: what stands before the numbers, such as "step".
        total: how many there are.
        done: of them before.
        console: where to.
        live: a thread redraws it between calls. Not where processes are forked while it is shown.
    """

    def __init__(self, label: str, total: int, done: int, console: Console, live: bool = False) -> None:
        self.label, self.total, self.console = label, total, console
        self._live = live
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(label + " {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=console,
                auto_refresh=live,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    @property
    def is_bar(self) -> bool:
        """It is redrawn in place; else every text is a line."""
        return self._bar is not None

    @property
    def room(self) -> int:
        """Columns for the text beside a bar."""
        return self.console.width - len(f"{self.label} {self.total}/{self.total}") - _NARROWEST_BAR

    def advance(self, done: int) -> None:
        """Move a bar to `done`, and leave its text as it is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def show(self, done: int, text: str) -> None:
        """Move a bar to `done` and change its text, or print a line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text, refresh=not self._live)
        else:
            self.console.print(f"{self.label} {done}/{self.total}  {text}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Bar:
    """A ProgressBar on stderr for work that is counted one by one, with its rate and the time left.

    Args:
        verb: what is done, such as "embedded".
        noun: what it is done to, such as "videos".
        total: how many.
        done: of them before.
    """

    def __init__(self, verb: str, noun: str, total: int, done: int = 0) -> None:
        console = Console(stderr=True)
        self._noun, self._total = noun, total
        self._began = time.monotonic(), done
        self._shown = time.monotonic()
        if done:
            console.print(f"resuming: {done} of {total} {noun} were done before", highlight=False)
        self._line = ProgressBar(verb, total, done, console)

    def show(self, done: int, text: str) -> None:
        """Called after each; most calls show nothing, the last always does."""
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_FRAMES if self._line.is_bar else _SECONDS_BETWEEN_LINES
        if now - self._shown < pause and done < self._total:
            return
        self._shown = now
        seconds, num_new = now - self._began[0], done - self._began[1]
        if num_new:
            left = timedelta(seconds=round(seconds / num_new * (self._total - done)))
            text = f"{num_new / seconds:.2f} {self._noun}/s  {text}  eta {left}"
        self._line.show(done, text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._line.close()
