"""Training processes that a server forks: it imports torch once, which costs a spawned process four core-seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing as mp

from vjepa_fast.distributed import processes

PRELOADED = [
    "vjepa_fast.train.launch_run",
    "vjepa_fast.cli.main",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "tests.e2e.harness",
]


def context() -> Any:
    """The multiprocessing context of the server, which starts with the first process and keeps its environment."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


_start_processes = mp.start_processes


def start_processes(function: Callable[..., object], args: tuple[Any, ...], **options: Any) -> Any:
    """torch's, whatever way to start them is asked for."""
    context()
    return _start_processes(function, args, **options | {"start_method": "forkserver"})


def launch(main: Callable[[int], int], num_processes: int) -> int:
    """`processes.launch`, but forked; how it spawns them is for tests/distributed/test_processes.py and tests/e2e."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.mp, "start_processes", start_processes)
        return processes.launch(main, num_processes)
