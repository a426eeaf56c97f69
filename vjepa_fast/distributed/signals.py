"""Turns SIGINT and SIGTERM into a request to stop, and SIGUSR1 into one to save, honoured between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE_SIGNAL = signal.SIGUSR1
SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
STOPPING = b"\nstopping: finishing the step and writing a checkpoint (Ctrl-C again: leave at once)\n"


class _StopWaiting(BaseException):
    """Raised by the handler out of a wait. Not an Exception, so that no library on the way swallows it."""


class StopSignals:
    """Handlers of SIGINT, SIGTERM and SIGUSR1.

    Args:
        second_leaves: a second SIGINT raises KeyboardInterrupt. False where a parent process decides that, because a
            terminal's Ctrl-C reaches a child twice: from the terminal and passed on by the parent.
        verbose: say on stderr, at the first SIGINT, what happens now.

    Attributes:
        code: exit code asked for so far: 0 (none), 130 (SIGINT) or 143 (SIGTERM).
        save_asked: a checkpoint is asked for (SIGUSR1); whoever writes it sets it back.
    """

    def __init__(self, second_leaves: bool = True, verbose: bool = True) -> None:
        self.code = 0
        self.save_asked = False
        self._second_leaves = second_leaves
        self._verbose = verbose
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over, also those held back until now; nothing happens if they are already.

        Outside the main thread, where Python allows no handlers, nothing happens either: who started the thread
        stops it.
        """
        if self._before:
            return
        try:
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        except ValueError:
            return
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def restore(self) -> None:
        """Give the signals back to the handlers there were before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def waiting(self, wait: Callable[[], T]) -> T | None:
        """What `wait` returns, or None as soon as a stop is asked for."""
        try:
            try:
                self._waiting = True
                return None if self.code else wait()
            finally:
                self._waiting = False
        except _StopWaiting:
            return None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self.save_asked = True
            return
        if number == signal.SIGINT and self.code and self._second_leaves:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not self.code and self._verbose:
            # Not print: the handler may have interrupted one.
            os.write(2, STOPPING)
        self.code = max(self.code, EXIT_CODES[signal.Signals(number)])
        if self._waiting:
            self._waiting = False
            raise _StopWaiting
