"""What a decoding process prints of its own end; signals while they start."""

from __future__ import annotations

import signal
import sys

import pytest

from vjepa_fast.data import workers
from vjepa_fast.data.workers import _report


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
    before = {number: signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
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
