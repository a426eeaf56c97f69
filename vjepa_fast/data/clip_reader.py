"""What a decoding process does: turns a step into one process's clips, and replaces those that cannot be had.

All decisions are vjepa_fast.data.sampling's; here they become requests (vjepa_fast.data.decode.request), which a back
end (vjepa_fast.data.decode.backend) executes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import sampling
from vjepa_fast.data.decode.backend import Preparer
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.request import ClipRequest, Source
from vjepa_fast.data.manifest import Dataset


class TooShort(DecodeError):
    """Left out by data.filter_short_videos."""


class Outcome(NamedTuple):
    """What became of one video: reason is None where a clip was read."""

    dataset: int
    video: int
    reason: str | None
    filtered: bool


class RawBatch(NamedTuple):
    """One step's clips of one process, each list by the frames-per-clip groups that are present, ascending.

    Attributes:
        step: counted from the beginning of the run.
        group_ids: which groups.
        collated: from Preparer.collate.
        sample_ids: int64 [B_g] global sample numbers, ascending.
        videos: (dataset, video) of every clip.
        outcomes: of every video tried, in order.
        failed_sample: the sample for which no video could be read; there are no clips then.
    """

    step: int
    group_ids: list[int]
    collated: list[Any]
    sample_ids: list[Tensor]
    videos: list[list[tuple[int, int]]]
    outcomes: list[Outcome]
    failed_sample: int | None


@dataclass
class ClipReader:
    """`reader[step]` is one process's batch of that step.

    `watch`: shared float64 [3 * workers]; each worker writes the dataset and video that it is reading and since when
    (time.monotonic), 0 where it reads none.
    """

    datasets: list[Dataset]
    groups: list[int]
    cfg: DataConfig
    rank: int
    world_size: int
    preparer: Preparer
    watch: Any = None
    sizes: list[int] = field(init=False)
    clips_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [len(dataset.paths) for dataset in self.datasets]
        self.clips_per_epoch = sum(self.sizes) * self.cfg.clips_per_video

    def choose(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and video, int64 [N] each, of global sample numbers."""
        return sampling.choose_videos(
            samples, self.sizes, self.cfg.datasets_weights, self.cfg.seed, self.cfg.shuffle, self.cfg.clips_per_video
        )

    def __getitem__(self, step: int) -> RawBatch:
        try:
            return self._read(step)
        finally:
            self._note(0, 0, 0.0)

    def _note(self, dataset: int, video: int, since: float) -> None:
        worker = get_worker_info()
        if self.watch is not None and worker is not None:
            self.watch[3 * worker.id : 3 * worker.id + 3] = [dataset, video, since]

    def _read(self, step: int) -> RawBatch:
        count = self.cfg.per_process(self.world_size)
        first = (step * self.world_size + self.rank) * count
        samples = np.arange(first, first + count, dtype=np.int64)
        outcomes: list[Outcome] = []
        clips: dict[int, list[Any]] = {}
        ids: dict[int, list[int]] = {}
        videos: dict[int, list[tuple[int, int]]] = {}
        chosen = zip(samples.tolist(), *(a.tolist() for a in self.choose(samples)), strict=True)
        # Clips of one video may also be the last of one process and the first of the next: each decodes its own.
        for (_, dataset, video), members in itertools.groupby(
            chosen, lambda one: (one[0] // self.cfg.clips_per_video, *one[1:])
        ):
            group = self.groups[dataset]
            own = [sample for sample, _, _ in members]
            for sample, found in zip(own, self._find_all(own, dataset, video, outcomes), strict=True):
                if found is None:
                    return RawBatch(step, [], [], [], [], outcomes, sample)
                clips.setdefault(group, []).append(found[0])
                ids.setdefault(group, []).append(sample)
                videos.setdefault(group, []).append((dataset, found[1]))
        present = sorted(clips)
        return RawBatch(
            step,
            present,
            [self.preparer.collate(clips[g]) for g in present],
            [torch.tensor(ids[g]) for g in present],
            [videos[g] for g in present],
            outcomes,
            None,
        )

    def _find_all(
        self, samples: list[int], dataset: int, video: int, outcomes: list[Outcome]
    ) -> Iterator[tuple[Any, int] | None]:
        """`find` for samples of one video, which is decoded once if it can be."""
        if len(samples) > 1:
            self._note(dataset, video, time.monotonic())
            try:
                opened: dict[int, Source] = {}
                clips = self.preparer.prepare_together([self.request(one, dataset, video, opened) for one in samples])
            except DecodeError:
                # One by one below, so that a clip and its replacement depend on nothing but the sample number.
                pass
            else:
                outcomes.append(Outcome(dataset, video, None, False))
                yield from ((clip, video) for clip in clips)
                return
        for sample in samples:
            yield self.find(sample, dataset, video, outcomes)

    def find(
        self, sample: int, dataset: int, video: int, outcomes: list[Outcome], after: int | None = None
    ) -> tuple[Any, int] | None:
        """The first clip that can be had for a sample.

        Args:
            sample: global sample number.
            dataset, video: from `choose`.
            outcomes: what became of every video tried is added to it.
            after: a video that failed later than here: those in front of it, and itself, are passed over.

        Returns:
            The prepared clip and the video it comes from, the sample's own or a replacement; None when there is none.
        """
        others = sampling.replacements(sample, video, self.sizes[dataset], self.cfg.seed)
        candidates: Iterator[int] = itertools.chain([video], others)
        if after is not None:
            candidates = itertools.islice(itertools.dropwhile(lambda one: one != after, candidates), 1, None)
        for candidate in candidates:
            self._note(dataset, candidate, time.monotonic())
            try:
                clip = self.preparer.prepare(self.request(sample, dataset, candidate))
            except DecodeError as error:
                outcomes.append(Outcome(dataset, candidate, str(error), isinstance(error, TooShort)))
            else:
                outcomes.append(Outcome(dataset, candidate, None, False))
                return clip, candidate
        return None

    def request(self, sample: int, dataset: int, video: int, opened: dict[int, Source] | None = None) -> ClipRequest:
        """Which frames, crop and flip a sample shows of a video.

        Args:
            sample: global sample number.
            dataset, video: the video.
            opened: what was opened of this video so far, by phase, is taken from here and added.

        Raises:
            DecodeError: the video cannot be used.
        """
        cfg, videos, epoch = self.cfg, self.datasets[dataset], sample // self.clips_per_epoch
        fpc = videos.fpc
        phase = sampling.choose_phase(sample, epoch, videos.num_phases(video), cfg.seed)
        opened = {} if opened is None else opened
        if phase not in opened:
            opened[phase] = videos.open(video, phase)
        source = opened[phase]
        numbers = np.zeros(fpc, dtype=np.int64)
        if not source.is_image:
            try:
                step = sampling.clip_step(
                    source.avg_fps,
                    fpc,
                    fps=cfg.fps,
                    duration=cfg.duration,
                    frame_step=cfg.frame_step,
                    round_fps=cfg.round_fps,
                )
            except ValueError as error:
                raise DecodeError(str(error)) from error
            if cfg.filter_short_videos and source.num_frames < step * fpc:
                raise TooShort(f"it has {source.num_frames} frames, a clip takes {step * fpc}")
            num_parts = cfg.clips_per_video if cfg.split_videos else 1
            length = source.num_frames // num_parts
            if length == 0:
                raise DecodeError(f"it has {source.num_frames} frames for {num_parts} clips")
            numbers = sample % num_parts * length + sampling.clip_frames(sample, epoch, length, fpc, step, cfg.seed)
        box = sampling.crop_box(
            sample,
            epoch,
            source.height,
            source.width,
            cfg.aug.random_resize_scale,
            cfg.aug.random_resize_aspect_ratio,
            cfg.seed,
        )
        flip = cfg.aug.horizontal_flip and sampling.is_flipped(sample, epoch, cfg.seed)
        return ClipRequest(source, numbers, box, cfg.crop_size, flip)
