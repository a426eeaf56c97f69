"""Batches of uint8 clips, in an order that no number of processes or workers changes.

Step s of process r of W holds the global sample numbers [s*G + r*b, s*G + (r+1)*b), with b clips per process and
G = b*W. What a sample number means is decided by vjepa_fast.data.sampling; a worker turns one step into one batch.
Saving the position takes one integer, the next step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.backend import Finisher, HostFinisher, HostPreparer
from vjepa_fast.data.manifest import load_datasets
from vjepa_fast.data.reader import ClipReader, RawBatch
from vjepa_fast.data.workers import WorkerInit, auto_num_workers, start_context
from vjepa_fast.errors import UserError

_MIN_TRIED = 20
_NUM_SHOWN = 5


@dataclass
class Batch:
    """One step's clips of one process.

    Attributes:
        step: counted from the beginning of the run.
        clips: per frames-per-clip group that is present, ascending: uint8 [B_g, T_g, H, W, 3].
        sample_ids: per group, int64 [B_g] global sample numbers, ascending; on the CPU.
        group_ids: per group, its index into `Loader.fpcs`.
        labels: per group, one label per clip.
    """

    step: int
    clips: list[Tensor]
    sample_ids: list[Tensor]
    group_ids: list[int]
    labels: list[list[Any]]


@dataclass(frozen=True)
class BrokenVideo:
    """A video that was replaced. `filtered`: it is sound, but data.filter_short_videos leaves it out."""

    path: str
    reason: str
    dataset: str
    filtered: bool = False


class Loader:
    """An iterable of batches. A second iteration goes on where the first one stopped."""

    def __init__(self, reader: ClipReader, finisher: Finisher, device: torch.device, step: int,
                 num_steps: int | None) -> None:
        cfg = reader.cfg
        self._reader = reader
        self._finisher = finisher
        self._device = device
        self._step = step
        self._end = None if num_steps is None else step + num_steps
        self.fpcs: list[int] = list(dict.fromkeys(dataset.fpc for dataset in reader.datasets))
        self.num_videos: int = sum(reader.sizes)
        self.num_workers: int = auto_num_workers(device) if cfg.num_workers is None else cfg.num_workers
        self._starts = np.cumsum([0, *reader.sizes])
        self._tried = np.zeros(self.num_videos, dtype=bool)
        self._num_broken = 0
        self._broken: dict[tuple[int, int], BrokenVideo] = {}
        self._batches: Any = None
        self._closing: Any = None
        self._finalizer: weakref.finalize | None = None

    @property
    def num_tried(self) -> int:
        """Distinct videos opened so far on this process."""
        return int(self._tried.sum())

    def group_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Index into `fpcs` of any global sample numbers, int64 of the same shape."""
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        if len(self.fpcs) == 1:
            return np.zeros(sample_ids.shape, dtype=np.int64)
        dataset, _ = self._reader.choose(sample_ids.reshape(-1))
        return np.asarray(self._reader.groups, dtype=np.int64)[dataset].reshape(sample_ids.shape)

    def state_dict(self) -> dict[str, int]:
        """`step`: the next one to be yielded."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved position; batches read ahead are dropped."""
        self.close()
        self._step = int(state["step"])

    def broken(self) -> list[BrokenVideo]:
        """Every video replaced so far on this process, once each, in the order met."""
        return list(self._broken.values())

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def close(self) -> None:
        """Ends the workers. Iterating again starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._batches = self._finalizer = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        while self._end is None or self._step < self._end:
            if self._batches is None:
                self._start()
            raw = self._next_raw()
            assert raw.step == self._step
            self._record(raw)
            self._step += 1
            yield self._to_batch(raw)

    def _start(self) -> None:
        cfg, context = self._reader.cfg, start_context()
        steps = itertools.count(self._step) if self._end is None else range(self._step, self._end)
        options: dict[str, Any] = {}
        closing = None
        if self.num_workers:
            closing = context.Event()
            options = {"prefetch_factor": cfg.prefetch, "multiprocessing_context": context,
                       "worker_init_fn": WorkerInit(closing)}
        loader: DataLoader[Any] = DataLoader(
            self._reader, batch_size=None, sampler=steps, num_workers=self.num_workers, collate_fn=_as_is,  # type: ignore[arg-type]
            **options)
        self._batches = iter(loader)
        self._finalizer = weakref.finalize(self, _shut_down, self._batches, closing)

    def _next_raw(self) -> RawBatch:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise UserError(
                f"a decoding process died ({error}). Most often memory ran out: lower data.num_workers "
                f"(now {self.num_workers}) or data.prefetch, or give the container more shared memory "
                "(docker run --shm-size=16g); data.num_workers=0 decodes in the training process") from error

    def _record(self, raw: RawBatch) -> None:
        for dataset, video, reason, filtered in raw.outcomes:
            number = self._starts[dataset] + video
            if reason is not None and not self._tried[number]:
                source = self._reader.datasets[dataset]
                self._broken[dataset, video] = BrokenVideo(source.paths[video], reason, source.name, filtered)
                self._num_broken += not filtered
            self._tried[number] = True
        tried, limit = self.num_tried, self._reader.cfg.max_broken
        if raw.failed_sample is None and (
                tried < min(_MIN_TRIED, self.num_videos) or self._num_broken <= limit * tried):
            return
        self.close()
        videos = self.broken()
        lines = [f"  {video.path}: {video.reason}" for video in videos[:_NUM_SHOWN]]
        if len(videos) > _NUM_SHOWN:
            lines.append(f"  ... and {len(videos) - _NUM_SHOWN} more")
        if raw.failed_sample is not None:
            source = self._reader.datasets[raw.outcomes[-1].dataset]
            what = f"no usable video found in dataset {source.name!r} in place of a broken or short one; "
        else:
            what = f"more than data.max_broken={limit:g} of the videos cannot be read; "
        raise UserError(f"{what}{len(videos)} of the {tried} videos tried were left out:\n" + "\n".join(lines))

    def _to_batch(self, raw: RawBatch) -> Batch:
        labels = [[self._reader.datasets[d].labels[v] for d, v in group] for group in raw.videos]
        clips = [self._finisher.wait(self._finisher.start(collated)).clips for collated in raw.collated]
        return Batch(raw.step, clips, raw.sample_ids, raw.group_ids, labels)


def build_loader(cfg: DataConfig, rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu", *,
                 start_step: int = 0, num_steps: int | None = None) -> Loader:
    """The clips of one process.

    Args:
        cfg: the data section.
        rank, world_size: of the training process.
        device: where the clips go, as uint8.
        start_step: first step.
        num_steps: how many batches; None is without end. The last step is start_step + num_steps - 1 wherever
            load_state_dict goes.

    Raises:
        UserError: a manifest cannot be used; while iterating, too many videos cannot be read.
    """
    assert 0 <= rank < world_size
    datasets = load_datasets(cfg)
    cfg.per_process(world_size)
    fpcs = list(dict.fromkeys(dataset.fpc for dataset in datasets))
    groups = [fpcs.index(dataset.fpc) for dataset in datasets]
    device = torch.device(device)
    reader = ClipReader(datasets, groups, cfg, rank, world_size, HostPreparer())
    finisher = HostFinisher(device, cfg.pin_mem, num_ahead=2)
    return Loader(reader, finisher, device, start_step, num_steps)


def _as_is(batch: RawBatch) -> RawBatch:
    return batch


def _shut_down(batches: Any, closing: Any) -> None:
    if closing is not None:
        closing.set()
        batches._shutdown_workers()
