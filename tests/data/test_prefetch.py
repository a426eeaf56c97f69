"""Reading ahead: bounded, in order, and over when it is closed; decoding processes that hang."""

from __future__ import annotations

import os
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
from vjepa_fast.data.clip_reader import RawBatch
from vjepa_fast.data.decode.backend import Finished, HostFinisher
from vjepa_fast.data.loader import build_loader
from vjepa_fast.data.prefetch import PlainPrefetcher, ThreadedPrefetcher


class Source:
    """Batches 0 to `count` - 1, then an error if there is one."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count = count
        self.error = error
        self.taken = 0

    def take(self, stop: threading.Event) -> RawBatch | None:
        if self.taken == self.count:
            if self.error is not None:
                raise self.error
            return None
        self.taken += 1
        return RawBatch(self.taken - 1, [0], [self.taken - 1], [], [], [], None)


class Finisher:
    """Counts."""

    def __init__(self, num_ahead: int) -> None:
        self.num_ahead = num_ahead
        self.started: list[int] = []

    def start(self, collated: int) -> int:
        self.started.append(collated)
        return collated * 10

    def wait(self, started: int) -> Finished:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", [PlainPrefetcher, ThreadedPrefetcher])
@pytest.mark.parametrize("num_ahead", [1, 3])
def test_order_and_bound(kind: Any, num_ahead: int) -> None:
    source, finisher = Source(20), Finisher(num_ahead)
    prefetcher = kind(source.take, finisher)
    for number in range(20):
        pending = prefetcher.take()
        assert pending.raw.step == number and pending.started == [number * 10]
        if number % 6 == 0:
            time.sleep(0.05)
        # This one is not waited for yet.
        assert source.taken <= number + num_ahead and len(finisher.started) <= number + num_ahead
        if kind is ThreadedPrefetcher and number % 6 == 0:
            assert source.taken == min(20, number + num_ahead)
        prefetcher.done()
    assert prefetcher.take() is None and prefetcher.take() is None
    prefetcher.close()


@pytest.mark.parametrize("kind", [PlainPrefetcher, ThreadedPrefetcher])
def test_error_comes_behind_the_batches_before_it(kind: Any) -> None:
    prefetcher = kind(Source(2, UserError("gone")).take, Finisher(1))
    for _ in range(2):
        assert prefetcher.take() is not None
        prefetcher.done()
    for _ in range(2):
        with pytest.raises(UserError, match="gone"):
            prefetcher.take()
    prefetcher.close()


def test_close_does_not_wait_for_a_batch_that_never_comes() -> None:
    def take(stop: threading.Event) -> None:
        assert stop.wait(30)

    prefetcher = ThreadedPrefetcher(take, Finisher(2))
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 20 and not prefetcher._thread.is_alive()


@pytest.fixture
def config(video_folder: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        return DataConfig(
            **{
                "datasets": [str(video_folder / "list.csv")],
                "batch_size": 2,
                "dataset_fpcs": [4],
                "crop_size": 32,
                "fps": 8.0,
                "cache_dir": tmp_path,
                "num_workers": 1,
                **changes,
            }
        )

    return make


@pytest.mark.parametrize("num_workers", [0, 1])
def test_thread_changes_nothing(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    cfg = config(num_workers=num_workers)
    with build_loader(cfg, num_steps=4) as loader:
        expected = list(loader)
    monkeypatch.setattr(loader_module, "PlainPrefetcher", ThreadedPrefetcher)
    with build_loader(cfg, num_steps=4) as loader:
        batches = list(loader)
        assert len(batches) == 4 and isinstance(loader._prefetcher, ThreadedPrefetcher)
        for batch, other in zip(batches, expected, strict=True):
            assert batch.labels == other.labels and torch.equal(batch.clips[0], other.clips[0])
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("kind", [PlainPrefetcher, ThreadedPrefetcher])
def test_interrupted_step_can_be_taken_again(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(loader_module, "PlainPrefetcher", kind)
    with build_loader(config(), num_steps=3) as loader:
        expected = list(loader)
    original, calls = HostFinisher.wait, []

    def wait(self: HostFinisher, started: Any) -> Finished:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, started)

    monkeypatch.setattr(HostFinisher, "wait", wait)
    loader = build_loader(config(), num_steps=3)
    batches = [next(iter(loader))]
    (worker,) = loader.worker_pids()
    with pytest.raises(KeyboardInterrupt):
        next(iter(loader))
    assert loader.worker_pids() == [] and loader.state_dict() == {"step": 1}
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    batches += list(loader)
    loader.close()
    for batch, other in zip(batches, expected, strict=True):
        assert batch.step == other.step and torch.equal(batch.clips[0], other.clips[0])


def test_stuck_worker_is_named_with_its_file(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = frame_sources.open_source

    def slow(path: str, *rest: Any) -> Any:
        if path.endswith("3.mp4"):
            time.sleep(2.5)
        return original(path, *rest)

    monkeypatch.setattr(frame_sources, "open_source", slow)
    monkeypatch.setattr(feed_module, "_STUCK_SECONDS", 0.3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with build_loader(config(), num_steps=4) as loader:
            assert len(list(loader)) == 4
    # On a busy machine other files may take a third of a second too; this one is named once however long it takes.
    busy = [str(warning.message) for warning in said if "busy with" in str(warning.message)]
    assert len([message for message in busy if "3.mp4 for" in message]) == 1, busy
