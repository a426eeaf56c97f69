"""Ends a run that hangs, and reports where it hung and in which process."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from enum import IntEnum

import torch.distributed as dist

from vjepa_fast.common.errors import UserError
from vjepa_fast.distributed import processes as distributed
from vjepa_fast.distributed.processes import Processes

_ANSWER_SECONDS = 5.0
"""How long the processes wait for each other's places once one of them has noticed."""


class Phase(IntEnum):
    """What a process does in a step, in this order: the one that is behind is the one that the others wait for."""

    CLIPS = 0
    OTHERS = 1
    STEP = 2
    LOG = 3
    CHECKPOINT = 4
    CHECKPOINT_DONE = 5

    @property
    def text(self) -> str:
        return (
            "waiting for clips",
            "waiting for the other processes",
            "in the training step",
            "writing its log",
            "writing a checkpoint",
            "waiting for the others after a checkpoint",
        )[self]


class Watchdog:
    """Ends the process if it makes no progress; all processes of a run have one.

    A thread looks. Each process then writes the Python stack of its main thread to stderr, and the one that is
    furthest behind is named. Where even that thread cannot run, faulthandler's timer writes the stacks and ends the
    process.

    Args:
        processes: of the run.
        seconds: without a new phase after which the process hangs; None: never looks.
    """

    def __init__(self, processes: Processes, seconds: float | None) -> None:
        self._processes = processes
        self._seconds = seconds
        self._place = (0, Phase.CLIPS)
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, phase: Phase) -> None:
        """Progress: the main thread begins a phase of a step."""
        self._place, self._since = (step, phase), time.monotonic()

    def start(self) -> None:
        """Begin to look; call it after the first step, which may compile for minutes. Nothing happens a second time."""
        if self._seconds is not None and self._thread is None:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        assert self._seconds is not None
        pause = min(1.0, self._seconds / 4)
        while not self._stop.wait(pause):
            # Fires only if this thread cannot run any more.
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(
                    2 * self._seconds + 4 * _ANSWER_SECONDS, exit=True, file=sys.__stderr__
                )
            if time.monotonic() - self._since > self._seconds:
                self._end()

    def _end(self) -> None:
        rank, (step, phase) = self._processes.rank, self._place
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        sys.stderr.write(
            f"process {rank} of {self._processes.world_size} has been at step {step}, {phase.text}, for "
            f"{time.monotonic() - self._since:.0f} s:\n{stack}"
        )
        sys.stderr.flush()
        distributed.leave(
            rank,
            UserError(
                f"no progress for {self._seconds:g} s (train.watchdog): {self._who(step, phase)}. The stacks are "
                "above; continue with --resume"
            ),
        )

    def _who(self, step: int, phase: Phase) -> str:
        """Names the processes that the others wait for."""
        if not self._processes.distributed:
            return f"step {step}, {phase.text}"
        places = self._places(step, phase)
        silent = [rank for rank in range(self._processes.world_size) if rank not in places]
        if silent:
            return f"no answer at all from {_names(silent)} of {self._processes.world_size}"
        last = min(places.values())
        behind = [rank for rank, place in places.items() if place == last]
        if len(behind) == len(places):
            return f"all processes are at step {step}, {phase.text}"
        return (
            f"stuck at step {last[0]}, {Phase(last[1]).text}: {_names(behind)} of {self._processes.world_size}, "
            "for which the others wait"
        )

    def _places(self, step: int, phase: Phase) -> dict[int, tuple[int, int]]:
        store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        found: dict[int, tuple[int, int]] = {}
        try:
            store.set(str(self._processes.rank), f"{step} {int(phase)}")
            deadline = time.monotonic() + _ANSWER_SECONDS
            while len(found) < self._processes.world_size and time.monotonic() < deadline:
                for rank in range(self._processes.world_size):
                    if rank not in found and store.check([str(rank)]):
                        where = store.get(str(rank)).decode().split()
                        found[rank] = int(where[0]), int(where[1])
                time.sleep(0.1)
        except RuntimeError:
            # Who holds the store has ended: it has told what it found.
            return found
        return found


def _names(ranks: list[int]) -> str:
    return ("process " if len(ranks) == 1 else "processes ") + ", ".join(map(str, ranks))
