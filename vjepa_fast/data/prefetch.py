"""Finishes batches ahead of the step.

`num_ahead` batches of a back end may be in work or waiting; beyond that nothing is taken from the decoding processes,
whose own queues are bounded too, so that a slow step stops the whole line. On a GPU a thread takes and starts them, so
that neither waiting for a decoding process nor pinning memory holds up the step; on a CPU they are started when the
step asks for one.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from vjepa_fast.data.clip_reader import RawBatch
from vjepa_fast.data.decode.backend import Finisher

Take = Callable[[threading.Event], "RawBatch | None"]
"""The next batch; None behind the last one, or soon after the event is set."""


class Pending(NamedTuple):
    """A batch, and what Finisher.start returned for each of its groups."""

    raw: RawBatch
    started: list[Any]


class Prefetcher(Protocol):
    def take(self) -> Pending | None:
        """The next batch, to be waited for; None behind the last one."""
        ...

    def done(self) -> None:
        """The batch taken last is waited for."""
        ...

    def close(self) -> None:
        """Ends it; no more calls of `take` on the source are under way afterwards."""
        ...


class PlainPrefetcher:
    """Starts batches in the thread that asks for them."""

    def __init__(self, take: Take, finisher: Finisher) -> None:
        self._take = take
        self._finisher = finisher
        self._pending: deque[Pending] = deque()
        self._never = threading.Event()
        self._at_end = False

    def take(self) -> Pending | None:
        while not self._at_end and len(self._pending) < self._finisher.num_ahead:
            raw = self._take(self._never)
            if raw is None:
                self._at_end = True
            else:
                self._pending.append(Pending(raw, [self._finisher.start(one) for one in raw.collated]))
        return self._pending.popleft() if self._pending else None

    def done(self) -> None:
        pass

    def close(self) -> None:
        self._pending.clear()


class ThreadedPrefetcher:
    """Starts batches in a thread of its own; what goes wrong there is raised by `take`."""

    def __init__(self, take: Take, finisher: Finisher) -> None:
        self._slots = threading.Semaphore(finisher.num_ahead)
        self._queue: queue.SimpleQueue[Pending | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        # A daemon: an interpreter that ends without closing the loader must not wait for it.
        self._thread = threading.Thread(
            target=_run, args=(take, finisher, self._slots, self._queue, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def take(self) -> Pending | None:
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            # Whoever asks again is told the same.
            self._queue.put(item)
        if isinstance(item, BaseException):
            raise item
        return item

    def done(self) -> None:
        self._slots.release()

    def close(self) -> None:
        self._stop.set()
        self._slots.release()
        if self._thread is not threading.current_thread():
            self._thread.join()


def _run(
    take: Take,
    finisher: Finisher,
    slots: threading.Semaphore,
    out: queue.SimpleQueue[Pending | BaseException | None],
    stop: threading.Event,
) -> None:
    try:
        while True:
            slots.acquire()
            raw = None if stop.is_set() else take(stop)
            if raw is None:
                break
            out.put(Pending(raw, [finisher.start(one) for one in raw.collated]))
        out.put(None)
    except BaseException as error:
        out.put(error)
