"""What a decoding process prints of its own end; signals while they start."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import weakref
from multiprocessing.connection import Connection

import pytest

from vjepa_fast.data import workers
from vjepa_fast.data.workers import _report, start_context


class Node:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def collect(answer: Connection) -> None:
    gc.collect()
    answer.send(gc.isenabled())


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_of_the_parent_is_left_alone_in_a_worker(enabled: bool) -> None:
    """Its destructor may wait for a thread that is not there: a DALI pipeline in a cycle made a worker hang."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    parent = os.getpid()
    process = start_context().Process(target=collect, args=(theirs,))
    gc.disable()
    try:
        # In a worker this would be sent before the answer.
        weakref.finalize(Node(), lambda: theirs.send("destroyed") if os.getpid() != parent else None).atexit = False
        if enabled:
            gc.enable()
        process.start()
        assert gc.isenabled() == enabled
        # What the worker leaves behind itself is collected.
        assert ours.recv() is True
        process.join(60)
        assert process.exitcode == 0
    finally:
        gc.enable()


def report(error: BaseException) -> None:
    try:
        raise error
    except BaseException:
        _report(*sys.exc_info())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), BrokenPipeError()])
def test_connection_that_ends_is_no_news(error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    report(error)
    assert capfd.readouterr().err == ""


def test_anything_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    report(ZeroDivisionError("by zero"))
    assert "ZeroDivisionError: by zero" in capfd.readouterr().err


def test_signals_while_processes_start_are_handled_behind() -> None:
    seen: list[str] = []
    before = {
        number: signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    }
    own = signal.getsignal(signal.SIGCHLD)
    try:
        with workers.unobserved():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            seen.append("started")
        assert seen == ["started", "SIGTERM", "SIGINT"] and signal.getsignal(signal.SIGCHLD) is own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
