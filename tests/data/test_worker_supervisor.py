"""Decoding processes that are killed: started again without losing a clip, until that is of no use."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import frame_sources
from vjepa_fast.data import loader as loader_module
from vjepa_fast.data import worker_supervisor as feed_module
from vjepa_fast.data.loader import build_loader
from vjepa_fast.data.prefetch import PlainPrefetcher, ThreadedPrefetcher
from vjepa_fast.data.worker_supervisor import Feed
from vjepa_fast.data.workers import start_context

BROKEN = "a decoding process died"


def test_more_processes_than_cores_are_no_news(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """The number is the config's; torch would print a warning of five lines each time the processes start."""
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1)
    loader = build_loader(config(), 0, 1, torch.device("cpu"))
    next(iter(loader))
    loader.close()
    assert not recwarn.list


@pytest.fixture
def config(video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    monkeypatch.setattr(feed_module, "_POLL_SECONDS", 0.2)

    def make(**changes: Any) -> DataConfig:
        return DataConfig(
            **{
                "datasets": [str(video_folder / "list.csv")],
                "batch_size": 2,
                "dataset_fpcs": [4],
                "crop_size": 32,
                "fps": 8.0,
                "cache_dir": tmp_path,
                "num_workers": 2,
                "prefetch": 1,
                **changes,
            }
        )

    return make


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], bool]], None]:
    """A decoding process that opens a file for which the function is true kills itself."""

    def install(is_deadly: Callable[[str], bool]) -> None:
        original, parent = frame_sources.open_source, os.getpid()

        def open_source(path: str, *rest: Any) -> Any:
            if os.getpid() != parent and is_deadly(path):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *rest)

        monkeypatch.setattr(frame_sources, "open_source", open_source)

    return install


@pytest.mark.parametrize("kind", [PlainPrefetcher, ThreadedPrefetcher])
def test_killed_process_costs_no_clip(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(loader_module, "PlainPrefetcher", kind)
    with build_loader(config(num_workers=0), num_steps=10) as loader:
        expected = list(loader)
    batches = []
    with warnings.catch_warnings(record=True) as said, build_loader(config(), num_steps=10) as loader:
        warnings.simplefilter("always")
        for batch in loader:
            if len(batches) in (2, 6):
                victim = loader.worker_pids()[len(batches) // 6]
                os.kill(victim, signal.SIGKILL)
            batches.append(batch)
        assert len(loader.worker_pids()) == 2 and victim not in loader.worker_pids()
    ours = [str(one.message) for one in said if BROKEN in str(one.message)]
    assert len(ours) == 2 and "SIGKILL" in ours[0] and "no clip is lost" in ours[0] and "shared memory" in ours[0]
    assert [batch.step for batch in batches] == list(range(10))
    for batch, other in zip(batches, expected, strict=True):
        assert batch.labels == other.labels and torch.equal(batch.clips[0], other.clips[0])


def test_process_that_dies_in_a_file_is_named_and_given_up(config: Callable[..., DataConfig], killer: Any) -> None:
    with build_loader(config(num_workers=0, shuffle=False), num_steps=4) as loader:
        expected = list(loader)
    killer(lambda path: path.endswith("5.mp4"))
    loader = build_loader(config(num_workers=1, shuffle=False), num_steps=4)
    batches = []
    with warnings.catch_warnings(record=True) as said, pytest.raises(UserError) as error:
        warnings.simplefilter("always")
        for batch in loader:
            batches.append(batch)
    assert "5.mp4), and so did those" in str(error.value) and "leave it out" in str(error.value)
    assert len([one for one in said if BROKEN in str(one.message)]) == feed_module._MAX_RESTARTS
    # What was finished before it is there, and the position is the step that could not be had.
    assert [batch.step for batch in batches] == [0, 1] and loader.state_dict() == {"step": 2}
    assert all(torch.equal(batch.clips[0], other.clips[0]) for batch, other in zip(batches, expected, strict=False))
    assert loader.worker_pids() == []


def test_process_that_dies_while_it_asks_whether_to_end(config: Callable[..., DataConfig], killer: Any) -> None:
    """A lock that it would hold then, nobody gives back."""

    def is_deadly(path: str) -> bool:
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            assert frame.f_back is not None
            frame = frame.f_back
        asking = getattr(frame.f_locals["done_event"], "_cond", None)
        if path.endswith("5.mp4") and asking is not None:
            asking.acquire()
        return path.endswith("5.mp4")

    killer(is_deadly)
    with warnings.catch_warnings(), build_loader(config(), num_steps=4) as loader:
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="so did those"):
            list(loader)


def test_deaths_that_lie_far_apart_are_put_up_with(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_MAX_RESTARTS", 1)
    monkeypatch.setattr(feed_module, "_FORGET_AFTER", 3)
    never = threading.Event()
    with warnings.catch_warnings(), build_loader(config()) as loader:
        warnings.simplefilter("ignore")
        feed = Feed(loader._reader, 0, None, 1)
        for _ in range(3):
            os.kill(feed.worker_pids()[0], signal.SIGKILL)
            taken = [feed.take(never) for _ in range(5)]
            assert all(taken)
        os.kill(feed.worker_pids()[0], signal.SIGKILL)
        assert feed.take(never).step == 15
        os.kill(feed.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(UserError, match=BROKEN):
            for _ in range(3):
                feed.take(never)
        feed.close()


def test_error_of_a_living_process_is_passed_on(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(frame_sources, "open_source", fail)
    for num_workers in (0, 1):
        with build_loader(config(num_workers=num_workers)) as loader, pytest.raises(RuntimeError, match="a mistake"):
            next(iter(loader))


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), UserError, "Cannot allocate memory.*lower data.num_workers"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), UserError, "Too many open files.*ulimit -n"),
        (pickle.PicklingError("no way to pickle it"), pickle.PicklingError, "no way to pickle it"),
    ],
)
def test_processes_that_cannot_be_started(
    config: Callable[..., DataConfig],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
    said: str,
) -> None:
    """What went wrong is told, and those that did start end."""
    started: list[Any] = []
    process = start_context().Process
    original = process.start

    def start(self: Any) -> None:
        if started:
            # Until the first one ignores signals.
            time.sleep(0.5)
            raise error
        original(self)
        started.append(self)

    try:
        with monkeypatch.context() as patch, warnings.catch_warnings(), build_loader(config()) as loader:
            warnings.simplefilter("ignore")
            patch.setattr(process, "start", start)
            with pytest.raises(expected, match=said):
                next(iter(loader))
        # As PyTorch and multiprocessing do at the end; it is ignored while training goes on.
        started[0].terminate()
        started[0].join(10)
        assert started[0].exitcode is not None
    finally:
        started[0].kill()


def test_prefetcher_that_fails_leaves_no_process(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds: list[Feed] = []

    def fail(take: Any, _: Any) -> Any:
        feeds.append(take.__self__)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(loader_module, "PlainPrefetcher", fail)
    with build_loader(config()) as loader, pytest.raises(RuntimeError, match="new thread"):
        next(iter(loader))
    workers = feeds[0]._batches._workers
    try:
        assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)
    finally:
        feeds[0].close()


class Entries:
    """What is read of a process's entry, one time after another."""

    def __init__(self, *entries: list[float]) -> None:
        self.entries = iter(entries)

    def __getitem__(self, _: slice) -> list[float]:
        return next(self.entries)


def test_file_that_is_held_is_told_only_where_it_is_sure(config: Callable[..., DataConfig]) -> None:
    """An entry may be read, or left behind by a process that died, while it is half written."""
    with build_loader(config(num_workers=0)) as loader:
        feed = Feed(loader._reader, 0, None, 0)
    sure, idle, impossible = [0.0, 3.0, 5.0], [0.0, 3.0, 0.0], [0.0, 8.0, 5.0]
    held = (loader._reader.datasets[0].paths[3], 5.0)
    for entries, expected in [
        ((sure, sure), held),
        ((sure, [0.0, 3.0, 6.0]), None),
        (([0.0, 2.0, 5.0], sure), None),
        ((idle, idle), None),
        ((impossible, impossible), None),
    ]:
        feed._watch = Entries(*entries)
        assert feed._held(0) == expected
    feed._watch, feed._num_workers = Entries(impossible, impossible), 1
    feed._report_stuck()
