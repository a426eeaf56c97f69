"""A bar for a person, a line now and then for a log file."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FRAMES = 0.2


class Bar:
    """How far some counted work is, on stderr.

    Args:
        verb: what is done, such as "embedded".
        noun: what it is done to, such as "videos".
        total: how many.
        done: of them before.
    """

    def __init__(self, verb: str, noun: str, total: int, done: int = 0) -> None:
        self._console = Console(stderr=True)
        self._verb, self._noun, self._total = verb, noun, total
        self._began = time.monotonic(), done
        self._shown = time.monotonic()
        self._bar: Progress | None = None
        if done:
            self._console.print(f"going on: {done} of {total} {noun} were done before", highlight=False)
        if self._console.is_terminal:
            # No thread of its own: decoding processes are forked while the bar is shown.
            self._bar = Progress(
                TextColumn(verb + " {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    def show(self, done: int, text: str) -> None:
        """Called after each."""
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_FRAMES
        if now - self._shown < pause and (self._bar is None or done < self._total):
            return
        self._shown = now
        seconds, num_new = now - self._began[0], done - self._began[1]
        left = timedelta(seconds=round(seconds / num_new * (self._total - done)))
        text = f"{num_new / seconds:.2f} {self._noun}/s  {text}  eta {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text, refresh=True)
        else:
            self._console.print(f"{self._verb} {done}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
