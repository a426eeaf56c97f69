"""Batches of uint8 clips, in an order that no number of processes or workers changes.

Step s of process r of W holds the global sample numbers [s*G + r*b, s*G + (r+1)*b), with b clips per process and
G = b*W. What a sample number means is decided by vjepa_fast.data.sampling; a worker turns one step into one batch.
Saving the position takes one integer, the next step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.clip_reader import ClipReader, Outcome
from vjepa_fast.data.decode.backend import Finisher
from vjepa_fast.data.decode.choose_backend import make_backend
from vjepa_fast.data.manifest import load_datasets
from vjepa_fast.data.prefetch import Pending, PlainPrefetcher, Prefetcher, ThreadedPrefetcher
from vjepa_fast.data.worker_supervisor import Feed
from vjepa_fast.data.workers import auto_num_workers

_MIN_TRIED = 20
# Standard deviations by which chance may exceed data.max_broken before all videos are tried.
_NUM_SIGMAS = 4.0
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

    @property
    def num_samples(self) -> int:
        """Clips of this process."""
        return sum(map(len, self.clips))


@dataclass(frozen=True)
class BrokenVideo:
    """A video that was replaced. `filtered`: it is sound, but data.filter_short_videos leaves it out."""

    path: str
    reason: str
    dataset: str
    filtered: bool = False


class Loader:
    """An iterable of batches. A second iteration goes on where the first one stopped."""

    def __init__(
        self, reader: ClipReader, finisher: Finisher, device: torch.device, step: int, num_steps: int | None
    ) -> None:
        cfg = reader.cfg
        self._reader = reader
        self._finisher = finisher
        self._device = device
        self._step = step
        self._end = None if num_steps is None else step + num_steps
        self.fpcs: list[int] = list(dict.fromkeys(dataset.fpc for dataset in reader.datasets))
        self.num_videos: int = sum(reader.sizes)
        self.clips_per_epoch: int = reader.clips_per_epoch
        self.num_workers: int = auto_num_workers(device) if cfg.num_workers is None else cfg.num_workers
        self._starts = np.cumsum([0, *reader.sizes])
        self._tried = np.zeros(self.num_videos, dtype=bool)
        self._num_broken = 0
        self._broken: dict[tuple[int, int], BrokenVideo] = {}
        self._feed: Feed | None = None
        self._prefetcher: Prefetcher | None = None
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
        return self._feed.worker_pids() if self._feed else []

    def close(self) -> None:
        """Ends the workers. Iterating again starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._feed = self._prefetcher = self._finalizer = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            try:
                batch = self._next()
            except BaseException:
                # Whatever is read ahead is dropped, so that another iteration begins at this step again.
                self.close()
                raise
            if batch is None:
                break
            self._step += 1
            yield batch

    def _next(self) -> Batch | None:
        prefetcher = self._prefetcher or self._start()
        pending = prefetcher.take()
        if pending is None:
            return None
        assert pending.raw.step == self._step
        self._record(pending.raw.outcomes, pending.raw.failed_sample)
        batch = self._finish(pending)
        prefetcher.done()
        return batch

    def _start(self) -> Prefetcher:
        self._feed = Feed(self._reader, self._step, self._end, self.num_workers)
        kind = ThreadedPrefetcher if self._device.type == "cuda" else PlainPrefetcher
        try:
            self._prefetcher = kind(self._feed.take, self._finisher)
        except BaseException:
            self._feed.close()
            raise
        self._finalizer = weakref.finalize(self, _shut_down, self._prefetcher, self._feed, self._finisher)
        return self._prefetcher

    def _record(self, outcomes: list[Outcome], failed_sample: int | None) -> None:
        for dataset, video, reason, filtered in outcomes:
            number = self._starts[dataset] + video
            if reason is not None and (dataset, video) not in self._broken:
                source = self._reader.datasets[dataset]
                self._broken[dataset, video] = BrokenVideo(source.paths[video], reason, source.name, filtered)
                self._num_broken += not filtered
            self._tried[number] = True
        tried, limit = self.num_tried, self._reader.cfg.max_broken
        if failed_sample is None and (tried < min(_MIN_TRIED, self.num_videos) or self._num_broken <= self._allowed()):
            return
        videos = self.broken()
        lines = [f"  {video.path}: {video.reason}" for video in videos[:_NUM_SHOWN]]
        if len(videos) > _NUM_SHOWN:
            lines.append(f"  ... and {len(videos) - _NUM_SHOWN} more")
        if failed_sample is not None:
            source = self._reader.datasets[outcomes[-1].dataset]
            what = f"no usable video found in dataset {source.name!r} in place of a broken or short one; "
        else:
            what = f"more than data.max_broken={limit:g} of the videos cannot be read; "
        raise UserError(f"{what}{len(videos)} of the {tried} videos tried were left out:\n" + "\n".join(lines))

    def _allowed(self) -> float:
        """How many broken videos are tolerated at this point.

        data.max_broken of those tried, and as many more as chance may put among them: the hypergeometric standard
        deviation, which is 0 when all are tried. A set with just that share of broken videos gets through.
        """
        limit, tried, total = self._reader.cfg.max_broken, self.num_tried, self.num_videos
        variance = limit * (1 - limit) * tried * (total - tried) / max(1, total - 1)
        return limit * tried + _NUM_SIGMAS * math.sqrt(variance)

    def _finish(self, pending: Pending) -> Batch:
        raw, clips = pending.raw, []
        for started, samples, videos in zip(pending.started, raw.sample_ids, raw.videos, strict=True):
            finished = self._finisher.wait(started)
            for position, reason in finished.failed:
                clip, videos[position] = self._replace(int(samples[position]), videos[position], reason)
                finished.clips[position] = clip
            clips.append(finished.clips)
        labels = [[self._reader.datasets[d].labels[v] for d, v in group] for group in raw.videos]
        return Batch(raw.step, clips, raw.sample_ids, raw.group_ids, labels)

    def _replace(self, sample: int, failed: tuple[int, int], reason: str) -> tuple[Tensor, tuple[int, int]]:
        """Another clip [T, H, W, 3] for one that passed in the decoding process and failed here, and where it is from.

        As for those that fail there, the replacement depends on nothing but the sample number.
        """
        (dataset,), (first,) = (chosen.tolist() for chosen in self._reader.choose(np.array([sample])))
        last, tried = failed[1], set[int]()
        while True:
            # Or this would not end.
            assert last not in tried
            tried.add(last)
            outcomes = [Outcome(dataset, last, reason, False)]
            found = self._reader.find(sample, dataset, first, outcomes, after=last)
            self._record(outcomes, sample if found is None else None)
            assert found is not None
            prepared, last = found
            finished = self._finisher.wait(self._finisher.start(self._reader.preparer.collate([prepared])))
            if not finished.failed:
                return finished.clips[0], (dataset, last)
            ((_, reason),) = finished.failed


def build_loader(
    cfg: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    *,
    start_step: int = 0,
    num_steps: int | None = None,
) -> Loader:
    """The clips of one process.

    Args:
        cfg: the data section.
        rank, world_size: of the training process.
        device: where the clips go, as uint8; `cuda` is the caller's current GPU.
        start_step: first step.
        num_steps: how many batches; None is without end. The last step is start_step + num_steps - 1 wherever
            load_state_dict goes.

    Raises:
        UserError: a manifest cannot be used; while iterating, too many videos cannot be read.
    """
    assert 0 <= rank < world_size
    datasets = load_datasets(cfg)
    fpcs = list(dict.fromkeys(dataset.fpc for dataset in datasets))
    groups = [fpcs.index(dataset.fpc) for dataset in datasets]
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        # Asked here: the thread that reads ahead has a current device of its own.
        device = torch.device("cuda", torch.cuda.current_device())
    preparer, finisher = make_backend(cfg, device, cfg.per_process(world_size))
    reader = ClipReader(datasets, groups, cfg, rank, world_size, preparer)
    return Loader(reader, finisher, device, start_step, num_steps)


def _shut_down(prefetcher: Prefetcher, feed: Feed, finisher: Finisher) -> None:
    prefetcher.close()
    feed.close()
    finisher.close()
