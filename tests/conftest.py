"""What every test gets: few threads, a fixed hypothesis profile, and without a GPU Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Read by torch and numpy when they are imported, which this file must not do: some tests time imports. The models of
# the tests are so small that a second thread costs more than it gains, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads this when it is imported. Only tests that ask for kernels run them in the interpreter (the fixture
# `kernels` of tests/ops sets VJEPA_FAST_OPS): it takes a millisecond or two a program, too slow for whole models.
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The examples are the same in every run, and a slow machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """SVT-AV1, which encodes some of the videos, gives the process real-time priority where root runs it, and whatever
    is started later inherits it: processes that wait for one another then keep each other from the cores for ever."""
    if sys.platform == "linux" and os.sched_getscheduler(0) != os.SCHED_OTHER:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


SLOW_FOLDERS = {"aot", "benchmarks", "e2e", "experiments", "parity"}
STARTS_PROCESSES = {"subprocess", "multiprocessing", "forked"}


def is_slow(item: pytest.Item) -> bool:
    """Tests of these folders, of files that import what starts processes, and of kernels in Triton's interpreter, which
    PyTorch's definitions stand in for: `make test-fast` leaves them out."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    interpreted = "kernels" in getattr(item, "fixturenames", ()) and "TRITON_INTERPRET" in os.environ
    starts_processes = not STARTS_PROCESSES.isdisjoint(vars(getattr(item, "module", item)))
    return folder in SLOW_FOLDERS or starts_processes or interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Benchmarks are collected with this file's hooks too where both are named.
        if item.path.is_relative_to(Path(__file__).parent) and is_slow(item):
            item.add_marker("slow")
    if "TRITON_INTERPRET" not in os.environ:
        # Kernels then run on the GPU.
        for item in items:
            if "kernels" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
