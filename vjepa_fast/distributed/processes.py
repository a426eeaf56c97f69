"""Starts processes, and lets them agree, wait and end together."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection, resource_tracker
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.distributed.signals import SIGNALS, STOPPING

_HOST = "127.0.0.1"
_FAILURE = "failure"
_GRACE_SECONDS = 5.0
"""How long the other processes may take to end by themselves (finish a file, notice) when one has failed."""


class Processes:
    """The processes of a run; a single one needs no process group.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and not self.distributed:
            raise ConfigError(
                f"WORLD_SIZE is {started}, but no process group exists; call "
                "torch.distributed.init_process_group first, or start the run with `vjepa-fast train`, "
                "which does it"
            )
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        # Flags and counts are exchanged between hosts' memories, without waiting for a device.
        self._host_group = dist.new_group(backend="gloo") if self.distributed else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_on_host(self, value: Tensor) -> Tensor:
        """Adds a CPU tensor up over all processes, in place."""
        if self.distributed:
            dist.all_reduce(value, group=self._host_group)
        return value

    def largest(self, value: int) -> int:
        """The largest of the processes' integers."""
        if not self.distributed:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(tensor)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.distributed:
            dist.barrier(group=self._host_group)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device.

    Raises:
        ConfigError: CUDA was asked for and torch cannot use it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device is cuda, but torch finds no usable GPU (torch.cuda.is_available() is false); "
            "set train.device=cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    # SLURM may show each task its own GPU alone (--gpus-per-task), which is number 0 in all of them.
    if num_gpus == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank):
        return torch.device("cuda", 0)
    if local_rank >= num_gpus:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU of its own: torch sees {num_gpus}; start "
            f"at most {num_gpus} a machine (--nproc, --nproc-per-node, --ntasks-per-node)"
        )
    return torch.device("cuda", local_rank)


def start_group(store: dist.Store, rank: int, world_size: int) -> None:
    """The default process group: NCCL between GPUs where there are any, gloo between hosts' memories."""
    # torch's C++ side warns, once a process, where searching for unused parameters found none in the first step.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def only_this_machine() -> None:
    """All processes are on this machine: its name need not resolve to an address that works."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _entry(rank: int, world_size: int, port: int, threads: int, main: Callable[[int], int]) -> None:
    place, size = str(rank), str(world_size)
    os.environ.update(RANK=place, LOCAL_RANK=place, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    only_this_machine()
    torch.set_num_threads(threads)
    store = dist.TCPStore(_HOST, port, is_master=False)
    # The parent, which holds the store, tells it.
    tell_failures_by(lambda failure: failure.claim(store))
    try:
        start_group(store, rank, world_size)
        code = main(rank)
        dist.destroy_process_group()
    except BaseException as error:
        leave(rank, error)
    sys.exit(code)


@dataclass(frozen=True)
class Failure:
    """What ended a process."""

    rank: int
    user_error: bool
    code: int
    """Exit code."""
    text: str
    """The message of a UserError, the traceback of anything else."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        lost = isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)
        if lost or isinstance(error, dist.DistError):
            error = UserError(
                "the connection to another process is lost; most likely it was killed, and its own "
                "output says more. Continue with --resume"
            )
        user_error = isinstance(error, UserError)
        text = str(error) if user_error else "".join(traceback.format_exception(error))
        return cls(rank, user_error, error.exit_code if isinstance(error, UserError) else 1, text)

    def claim(self, store: dist.Store) -> bool:
        """Put it into the store unless another is there: the first failure causes the others. False where one is."""
        own = json.dumps(asdict(self))
        with suppress(OSError):
            sys.stdout.flush()
        # Who holds the store may be gone.
        with suppress(RuntimeError):
            return store.compare_set(_FAILURE, "", own) == own.encode()
        return False


def _tell_alone(failure: Failure) -> None:
    sys.stderr.write(f"error: {failure.text}\n" if failure.user_error else failure.text)
    sys.stderr.flush()


_tell: Callable[[Failure], object] = _tell_alone


def tell_failures_by(tell: Callable[[Failure], object]) -> None:
    """What `leave` does with a failure, in this process."""
    global _tell
    _tell = tell


def leave(rank: int, error: BaseException) -> NoReturn:
    """Tell what went wrong and end this process at once, without clean-up: the others may be waiting for it in a
    collective, and so notice. May be called from any thread."""
    failure = Failure.of(rank, error)
    _tell(failure)
    os._exit(failure.code)


def launch(main: Callable[[int], int], num_processes: int) -> int:
    """Run `main(rank)` in `num_processes` processes on this machine and wait.

    SIGTERM, SIGINT and SIGUSR1 are passed on; `main` has to take them over (`StopSignals.install`), until then they are
    held back. A second SIGINT kills the processes. When one process fails, the others are ended.

    Returns:
        The largest of the exit codes that `main` returned.

    Raises:
        UserError: what the first process that failed raised, or which process was killed.
        KeyboardInterrupt: a second SIGINT.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    handlers = _Passing()
    # Starting it lifts the block below, so it has to run before.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        arguments = (num_processes, store.port, threads, main)
        context = mp.start_processes(_entry, arguments, nprocs=num_processes, join=False, start_method="spawn")
        assert context is not None
        handlers.processes = context.processes
        before = {number: signal.signal(number, handlers) for number in SIGNALS}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        killed = _wait(context.processes)
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
    if handlers.left:
        raise KeyboardInterrupt
    _raise_failure(context.processes, killed, store)
    return max(process.exitcode or 0 for process in context.processes)


class _Passing:
    """Signal handler of the parent."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.asked = self.left = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            self.left = True
            number = signal.SIGKILL
        elif number == signal.SIGINT:
            os.write(2, STOPPING)
        self.asked = self.asked or number == signal.SIGINT
        for process in self.processes:
            with suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, number)


def _wait(processes: list[Any]) -> set[int]:
    """Waits until all have ended; once one has failed the others get a little time. Returns the ranks killed here."""
    deadline: float | None = None
    killed: set[int] = set()
    while alive := [rank for rank, process in enumerate(processes) if process.is_alive()]:
        if deadline is None and any(process.exitcode not in (None, 0, 130, 143) for process in processes):
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            killed.update(alive)
            for rank in alive:
                processes[rank].kill()
        connection.wait([processes[rank].sentinel for rank in alive], timeout=0.2)
    return killed


def _raise_failure(processes: list[Any], killed: set[int], store: dist.TCPStore) -> None:
    for rank, process in enumerate(processes):
        if (process.exitcode or 0) < 0 and rank not in killed:
            name = signal.Signals(-process.exitcode).name
            hint = "; most often memory ran out" if name == "SIGKILL" else ""
            raise UserError(
                f"training process {rank} of {len(processes)} was ended by {name}{hint}; the others were "
                "stopped. Continue with --resume"
            )
    if not store.check([_FAILURE]):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (0, 130, 143)]
        if failed:
            raise UserError(f"training process {failed[0]} ended with code {processes[failed[0]].exitcode}")
        return
    failure = Failure(**json.loads(store.get(_FAILURE)))
    if failure.user_error:
        raise (ConfigError if failure.code == ConfigError.exit_code else UserError)(failure.text)
    sys.stderr.write(failure.text)
    raise UserError(f"training process {failure.rank} of {len(processes)} failed as shown above")
