"""Decoding processes: how many, how they start, and how they end."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

# From about here on one GPU is fed: 134 clips/s of ViT-L at a quarter of a core-second per raw clip.
_MAX_AUTO_WORKERS = 32
_POLL_SECONDS = 1.0


def available_cores() -> int:
    """CPU cores this process may use: affinity mask and container quota taken into account."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup/cpu")
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        if limit > 0:
            cores = min(cores, math.ceil(limit / int((folder / "cpu.cfs_period_us").read_text())))
    return max(1, cores)


def auto_num_workers(device: torch.device) -> int:
    """Workers per training process when none are configured: the cores of its share, less one for itself.

    With a single core a worker only helps where the training process waits for a GPU.
    """
    share = available_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(_MAX_AUTO_WORKERS, max(share - 1, 1 if device.type == "cuda" else 0))


class Flag:
    """An event that is set once, without a lock: multiprocessing's own holds one while it is asked, and a process that
    is killed just then keeps it, so that whoever asks next, the training process included, waits for ever."""

    def __init__(self, context: Any) -> None:
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


_METHOD = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class _Process(_METHOD.Process):  # type: ignore[name-defined]
    """A process that leaves alone what the one that forked it left behind as garbage.

    Destructors of such objects may wait for threads that a fork does not copy: a DALI pipeline's does, for ever.
    """

    def start(self) -> None:
        enabled = gc.isenabled()
        gc.disable()
        try:
            super().start()
        finally:
            if enabled:
                gc.enable()

    def run(self) -> None:
        gc.freeze()
        gc.enable()
        super().run()


class _Context(type(_METHOD)):  # type: ignore[misc]
    """What PyTorch's loader makes its processes and events with."""

    Process = _Process

    def Event(self) -> Flag:  # noqa: N802
        return Flag(self)


def start_context() -> Any:
    """The multiprocessing context of the workers, with events that survive a process that is killed.

    fork where the platform has it, by measurement and because of what users write: a forked worker is ready in
    10 ms, a spawned one in the 2 s that importing torch takes, and spawn or forkserver would run a script
    without `if __name__ == "__main__"` again in every worker. What makes fork risky is avoided: a worker uses one
    thread, never touches CUDA, opens every file itself, and destroys nothing of its parent's.
    """
    return _Context()


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Inside, decoding processes are started.

    From the main thread, because glibc's allocator treats a process as the thread that forked it, and outside its main
    arena slices of video cost 5 kB a batch that never come back. There PyTorch installs a handler of SIGCHLD, which
    would raise in the middle of a step when a process dies; Feed.take notices it too, within a second, where it can be
    handled: the handler is taken out again. SIGINT and SIGTERM that arrive meanwhile, when half of the processes are
    there, are handled behind. In any other thread there is nothing to do, and nothing of this can be done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    held = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in held}
    on_child = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    try:
        yield
    finally:
        if sys.platform != "win32" and on_child is not None:
            signal.signal(signal.SIGCHLD, on_child)
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


class WorkerInit:
    """Runs first in every worker.

    Ctrl-C and a preempting SIGTERM reach the whole process group, but the training process still needs its workers
    to finish the step and write a checkpoint: they ignore both until `closing` is set. A parent that was killed takes
    them along within a second.
    """

    def __init__(self, closing: Any) -> None:
        self.parent = os.getpid()
        self.closing = closing

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A checkpoint is asked for, which is none of its business.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_terminate)
        sys.excepthook = _report
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_terminate(self, *_: Any) -> None:
        if self.closing.is_set():
            os._exit(0)

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a worker prints of an exception that nobody caught.

    The thread by which multiprocessing hands batches over comes here when the training process stops while it fetches
    one: that is no news. Errors of the dataset do not come here, the loader passes them on.
    """
    if not isinstance(error, (EOFError, OSError)):
        sys.__excepthook__(kind, error, trace)
