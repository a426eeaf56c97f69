"""Signals become a request to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from vjepa_fast.distributed.signals import EXIT_CODES, StopSignals


@pytest.fixture(params=[True, False])
def stop(request: pytest.FixtureRequest) -> Iterator[StopSignals]:
    signals = StopSignals(second_leaves=request.param, verbose=False)
    signals.second_leaves = request.param  # type: ignore[attr-defined]
    signals.install()
    yield signals
    signals.restore()


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    # The handler runs between two bytecodes.
    time.sleep(0)


@pytest.mark.parametrize("number", EXIT_CODES)
def test_request(number: int, stop: StopSignals) -> None:
    assert stop.code == 0
    send(number)
    assert stop.code == EXIT_CODES[signal.Signals(number)]


def test_second_ctrl_c(stop: StopSignals) -> None:
    """A rank hears one Ctrl-C twice, from the terminal and from its parent."""
    send(signal.SIGINT)
    if stop.second_leaves:  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    else:
        send(signal.SIGINT)
    assert stop.code == 130


def test_second_sigterm_is_harmless(stop: StopSignals) -> None:
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert stop.code == 143


def test_waiting_ends(stop: StopSignals) -> None:
    def wait() -> str:
        try:
            send(signal.SIGTERM)
        except Exception:
            # What a library on the way may do.
            pytest.fail("swallowed")
        return "arrived"

    assert stop.waiting(lambda: "arrived") == "arrived"
    assert stop.waiting(wait) is None
    assert stop.waiting(lambda: "arrived") is None


def test_signals_held_back_before_are_met(stop: StopSignals) -> None:
    stop.restore()
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    # To this thread: another one of the process, which holds nothing back, would die of it.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    stop.install()
    time.sleep(0)
    assert stop.code == 143


def test_restored() -> None:
    before = [signal.getsignal(number) for number in EXIT_CODES]
    signals = StopSignals()
    signals.install()
    signals.install()
    signals.restore()
    assert [signal.getsignal(number) for number in EXIT_CODES] == before
