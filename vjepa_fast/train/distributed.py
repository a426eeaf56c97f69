"""Processes: which one this is, how they start, how they agree."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vjepa_fast.errors import ConfigError


class Processes:
    """The processes of a run; a single one needs no process group.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
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
        raise ConfigError("train.device is cuda, but torch finds no usable GPU (torch.cuda.is_available() is false); "
                          "set train.device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"process {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}; "
                          "use a smaller --nproc")
    return torch.device("cuda", local_rank)


def _entry(rank: int, world_size: int, rendezvous: str, threads: int, main: Callable[[int], int]) -> None:
    place, size = str(rank), str(world_size)
    os.environ.update(RANK=place, LOCAL_RANK=place, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    torch.set_num_threads(threads)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        code = main(rank)
    except BaseException:
        # The others may be waiting in a collective; leaving at once lets the parent end them.
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
    sys.exit(code)


def launch(main: Callable[[int], int], num_processes: int) -> int:
    """Run `main(rank)` in `num_processes` processes on this machine and wait.

    SIGTERM and SIGINT reach every process once. When one process fails, the others are ended.

    Returns:
        0, or the first exit code that is not.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    with tempfile.TemporaryDirectory(prefix="vjepa-fast-") as folder:
        arguments = (num_processes, str(Path(folder) / "rendezvous"), threads, main)
        context = mp.start_processes(_entry, arguments, nprocs=num_processes, join=False, start_method="spawn")
        assert context is not None

        def forward(number: int, frame: FrameType | None) -> None:
            for process in context.processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, number)

        def interrupt(number: int, frame: FrameType | None) -> None:
            # A terminal sends Ctrl-C to every process of the group; only a kill aimed at the parent must be passed on.
            if not sys.stdin.isatty():
                forward(number, frame)

        handlers = {signal.SIGTERM: forward, signal.SIGINT: interrupt}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            for process in _until_first_failure(context.processes):
                process.terminate()
            for process in context.processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()
        finally:
            for number, earlier in before.items():
                signal.signal(number, earlier)
        codes = [process.exitcode or 0 for process in context.processes]
    failed = [code for code in codes if code > 0]
    return failed[0] if failed else (1 if any(codes) else 0)


def _until_first_failure(processes: list[mp.Process]) -> list[mp.Process]:
    """Waits until all have ended or one has ended badly; returns those still alive."""
    while True:
        alive = [process for process in processes if process.is_alive()]
        failed = any(process.exitcode not in (None, 0, 130, 143) for process in processes)
        if not alive or failed:
            return alive
        alive[0].join(timeout=0.2)
