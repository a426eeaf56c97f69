"""Batches from the decoding processes, in order; what happens when one of them dies or hangs."""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader

from vjepa_fast.data.reader import ClipReader, RawBatch
from vjepa_fast.data.workers import WorkerInit, start_context
from vjepa_fast.errors import UserError

_POLL_SECONDS = 1.0
_STUCK_SECONDS = 60.0


class Feed:
    """The batches of some steps. One thread at a time may call `take`.

    Args:
        reader: what the processes do.
        steps: which batches.
        num_workers: decoding processes; 0 decodes where `take` is called.
    """

    def __init__(self, reader: ClipReader, steps: Iterable[int], num_workers: int) -> None:
        self._reader = reader
        self._num_workers = num_workers
        self._closing: Any = None
        self._watch: Any = None
        self._reported: set[tuple[int, int, float]] = set()
        options: dict[str, Any] = {}
        if num_workers:
            context = start_context()
            self._closing = context.Event()
            self._watch = context.RawArray("d", 3 * num_workers)
            reader = dataclasses.replace(reader, watch=self._watch)
            options = {"prefetch_factor": reader.cfg.prefetch, "multiprocessing_context": context,
                       "worker_init_fn": WorkerInit(self._closing), "timeout": _POLL_SECONDS}
        loader: DataLoader[Any] = DataLoader(
            reader, batch_size=None, sampler=steps, num_workers=num_workers, collate_fn=_as_is,  # type: ignore[arg-type]
            **options)
        # Started from the main thread, PyTorch would raise in the middle of a step when a process dies. `take` notices
        # it too, within a second, where it can be handled.
        starter = threading.Thread(target=lambda: setattr(self, "_batches", iter(loader)))
        starter.start()
        starter.join()
        self._batches: Any

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def take(self, stop: threading.Event) -> RawBatch | None:
        """The next batch; None behind the last one, or at most a second after `stop` is set.

        Raises:
            UserError: a process died.
        """
        while not stop.is_set():
            try:
                return next(self._batches)
            except StopIteration:
                return None
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    self._report_stuck()
                elif "DataLoader worker" in str(error):
                    raise UserError(
                        f"a decoding process died ({error}). Most often memory ran out: lower data.num_workers "
                        f"(now {self._num_workers}) or data.prefetch, or give the container more shared memory "
                        "(docker run --shm-size=16g); data.num_workers=0 decodes in the training process") from error
                else:
                    raise
        return None

    def _report_stuck(self) -> None:
        now = time.monotonic()
        for worker in range(self._num_workers):
            dataset, video, since = self._watch[3 * worker:3 * worker + 3]
            held = int(dataset), int(video), since
            if since and now - since > _STUCK_SECONDS and held not in self._reported:
                self._reported.add(held)
                path = self._reader.datasets[int(dataset)].paths[int(video)]
                warnings.warn(f"a decoding process has been busy with {path} for {now - since:.0f} s, and training "
                              "waits for it; if that does not end, look whether the file can be read, and leave it out",
                              RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Ends the processes; nobody may be in `take`."""
        if self._closing is not None:
            self._closing.set()
            self._batches._shutdown_workers()


def _as_is(batch: RawBatch) -> RawBatch:
    return batch
