"""Collects batches from the decoding processes in order, and handles those that die or hang.

A process that dies (most often the kernel's out-of-memory killer) costs what is read ahead and no more: a batch is a
pure function of its step, so all processes are started again at the first step that has not arrived. Only when that
happens again and again, without _FORGET_AFTER batches in between, is it left to the user.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
import threading
import time
import warnings
from multiprocessing import connection
from typing import Any

from torch.utils.data import DataLoader

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.clip_reader import ClipReader, RawBatch
from vjepa_fast.data.workers import WorkerInit, start_context, unobserved

_POLL_SECONDS = 1.0
# On a busy machine a connection breaks long before its process is seen to be over.
_DEATH_SECONDS = 10.0
_STUCK_SECONDS = 60.0
_MAX_RESTARTS = 3
_FORGET_AFTER = 100
_ADVICE = (
    "Most often memory ran out: lower data.num_workers (now {}) or data.prefetch, or give the container more "
    "shared memory (docker run --shm-size=16g); data.num_workers=0 decodes in the training process"
)
_NO_START = (
    "the decoding processes cannot be started ({}): lower data.num_workers (now {}), or raise the limits of "
    "memory, open files (ulimit -n) and processes (ulimit -u); data.num_workers=0 decodes in the training "
    "process"
)


class _Loader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """No warning of more processes than cores: the config says so, as the reference's files do on a small machine;
        where it says nothing there are fewer (auto_num_workers)."""


class Feed:
    """The batches of some steps. One thread at a time may call `take`.

    Args:
        reader: what the processes do.
        step: the first batch.
        end: behind the last one; None is without end.
        num_workers: decoding processes; 0 decodes where `take` is called.

    Raises:
        UserError: the system refuses to start them.
    """

    def __init__(self, reader: ClipReader, step: int, end: int | None, num_workers: int) -> None:
        self._reader = reader
        self._step = step
        self._end = end
        self._num_workers = num_workers
        self._num_restarts = 0
        self._num_since = 0
        self._closing: Any = None
        self._watch: Any = None
        self._batches: Any = None
        self._reported: set[tuple[str, float]] = set()
        self._start()

    def _start(self) -> None:
        self._batches = None
        try:
            with unobserved():
                self._batches = iter(self._loader())
        except BaseException as error:
            # Those that did start may end.
            self.close()
            if isinstance(error, OSError):
                raise UserError(_NO_START.format(error.strerror or error, self._num_workers)) from error
            raise

    def _loader(self) -> DataLoader[Any]:
        reader = self._reader
        options: dict[str, Any] = {}
        if self._num_workers:
            # Everything anew after a death: a process may have died with a lock in its hand.
            context = start_context()
            self._closing = context.Event()
            self._watch = context.RawArray("d", 3 * self._num_workers)
            reader = dataclasses.replace(reader, watch=self._watch)
            options = {
                "prefetch_factor": reader.cfg.prefetch,
                "multiprocessing_context": context,
                "worker_init_fn": WorkerInit(self._closing),
                "timeout": _POLL_SECONDS,
            }
        steps = itertools.count(self._step) if self._end is None else range(self._step, self._end)
        return _Loader(
            reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=steps,
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=self._num_workers,
            **options,
        )

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def take(self, stop: threading.Event) -> RawBatch | None:
        """The next batch; None behind the last one, or at most a second after `stop` is set.

        Raises:
            UserError: processes die again and again.
        """
        while not stop.is_set():
            try:
                batch: RawBatch = next(self._batches)
            except StopIteration:
                return None
            except (RuntimeError, OSError, EOFError) as error:
                if "DataLoader timed out" in str(error):
                    self._report_stuck()
                elif self._dead(_DEATH_SECONDS if isinstance(error, (ConnectionError, EOFError)) else _POLL_SECONDS):
                    self._restart(error)
                else:
                    raise
            else:
                self._step += 1
                self._num_since += 1
                return batch
        return None

    def _dead(self, patience: float = 0) -> list[tuple[int, Any]]:
        """Number and process of every worker that ended though nobody asked it to, within `patience` seconds."""
        workers = getattr(self._batches, "_workers", [])
        ended = connection.wait([worker.sentinel for worker in workers], patience) if workers else []
        for worker in workers:
            if worker.sentinel in ended:
                # What it held open is closed a moment before it can be waited for.
                worker.join(_DEATH_SECONDS)
        return [(number, worker) for number, worker in enumerate(workers) if worker.exitcode is not None]

    def _restart(self, error: Exception) -> None:
        """Starts the processes again, or gives up."""
        if self._num_since >= _FORGET_AFTER:
            self._num_restarts = 0
        how = "; ".join(self._describe(number, worker) for number, worker in self._dead())
        advice = _ADVICE.format(self._num_workers)
        if self._num_restarts == _MAX_RESTARTS:
            raise UserError(
                f"a decoding process died ({how}), and so did those that were started in its place, {_MAX_RESTARTS} "
                f"times. {advice}. Where the same file is named every time, the decoder crashes on it: leave it out"
            ) from error
        self._num_restarts += 1
        self._num_since = 0
        warnings.warn(
            f"a decoding process died ({how}); all of them are started again and no clip is lost. {advice}",
            RuntimeWarning,
            stacklevel=2,
        )
        self.close()
        self._start()

    def _describe(self, number: int, worker: Any) -> str:
        code = worker.exitcode
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        held = self._held(number)
        return f"process {worker.pid}, {how}" + (f" while it read {held[0]}" if held else "")

    def _held(self, number: int) -> tuple[str, float] | None:
        """The file that a process reads and since when; None if it reads none, or is just going over to the next."""
        entry, again = (list(self._watch[3 * number : 3 * number + 3]) for _ in range(2))
        dataset, video, since = entry
        paths = self._reader.datasets[int(dataset)].paths
        # Written without a lock: half of an entry may be new, also for good where the process died over it.
        if not since or entry != again or video >= len(paths):
            return None
        return paths[int(video)], since

    def _report_stuck(self) -> None:
        now = time.monotonic()
        for held in map(self._held, range(self._num_workers)):
            if held is not None and now - held[1] > _STUCK_SECONDS and held not in self._reported:
                self._reported.add(held)
                path, since = held
                warnings.warn(
                    f"a decoding process has been busy with {path} for {now - since:.0f} s, and training "
                    "waits for it; if that does not end, look whether the file can be read, and leave it out",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Ends the processes; nobody may be in `take`."""
        if self._closing is not None:
            self._closing.set()
            if self._batches is not None:
                self._batches._shutdown_workers()


def _as_is(batch: RawBatch) -> RawBatch:
    return batch
