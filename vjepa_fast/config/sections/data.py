"""Sections `data` and `img_data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from vjepa_fast.config.sections.base import PositiveInt, Range, Section, Size, as_list


class AugmentationConfig(Section):
    """Random resized crop and horizontal flip (reference: app/vjepa/transforms.py)."""

    random_resize_scale: Range = (0.3, 1.0)
    random_resize_aspect_ratio: Range = (0.75, 1.35)
    horizontal_flip: bool = True

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        for name, top in (("random_resize_scale", 1.0), ("random_resize_aspect_ratio", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} is [{low}, {high}]; expected 0 < low <= high <= {top:g}")
        return self


class DataConfig(Section):
    """Which clips, and how they are read."""

    datasets: Annotated[list[str], BeforeValidator(as_list)] = []
    """One or several of: CSV, .npy, folder, glob, pack, or `synthetic:` for the clips that the demo makes itself,
    `physics:` for those of vjepa_fast.data.physics."""
    datasets_weights: list[float] | None = None
    dataset_fpcs: Annotated[list[PositiveInt], Field(min_length=1)] = [16]
    """Frames per clip, one entry a dataset; one entry serves all."""
    batch_size: PositiveInt | None = None
    """Clips per process and step. Set this or global_batch_size."""
    global_batch_size: PositiveInt | None = None
    """Clips per step over all processes: the run is then the same at any number of processes."""
    fps: float | None = None
    """Frames per second of a clip. At most one of fps, duration (seconds) and frame_step; none means fps 4."""
    duration: float | None = None
    frame_step: PositiveInt | None = None
    round_fps: bool = True
    """Round a video's frame rate up to a whole number before fps or duration is turned into frames, as V-JEPA 2 does;
    V-JEPA 1 does not."""
    clips_per_video: PositiveInt = 1
    """Clips of a step that come from one video, each with its own window, crop and flip: PyAV decodes the video once
    for all of them. The clips of a batch are then less diverse. Divides batch_size or global_batch_size."""
    split_videos: bool = False
    """Cut a video into clips_per_video parts of one length and take a clip from each, as V-JEPA 1 does; else every
    clip comes from anywhere in the video."""
    crop_size: Size = (256, 256)
    patch_size: PositiveInt = 16
    tubelet_size: PositiveInt = 2
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding processes per training process; None: by the cores there are."""
    prefetch: PositiveInt = 2
    """Batches each worker reads ahead."""
    backend: Literal["auto", "pyav", "dali"] = "auto"
    """What decodes: `auto` is DALI on a GPU where it is installed (the extra `dali`), else PyAV."""
    device_prefetch: PositiveInt | None = None
    """Batches that are copied or decoded ahead of the step on the device, with DALI each by a pipeline of its own.
    None: 4 with DALI on a GPU, 2 with PyAV on a GPU or DALI on the CPU. PyAV on the CPU has nothing to do ahead."""
    dali_threads: PositiveInt | None = None
    """Threads of each DALI pipeline; None: 8 on a GPU, where they wait for its decoders, else the cores there are."""
    pin_mem: bool = True
    filter_short_videos: bool = False
    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Stop when more than this fraction of the videos tried could not be read."""
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Taken from train.seed."""
    cache_dir: Path | None = None
    """Where keyframe indices are kept; None: $XDG_CACHE_HOME/vjepa_fast."""
    aug: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        given = [name for name in ("fps", "duration", "frame_step") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; keep one and set the other to null")
        for name in given:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not given:
            self.fps = 4
        if self.batch_size is not None and self.global_batch_size is not None:
            raise ValueError(
                "batch_size (per process) and global_batch_size (all processes) are both set; "
                "keep one and set the other to null"
            )
        if self.batch_size is None and self.global_batch_size is None:
            self.batch_size = 24
        name = "global_batch_size" if self.batch_size is None else "batch_size"
        if getattr(self, name) % self.clips_per_video:
            raise ValueError(
                f"clips_per_video {self.clips_per_video} does not divide {name} {getattr(self, name)}; "
                "set it to a divisor, so that the clips of a video are in one step"
            )
        count = len(self.datasets)
        if count and len(self.dataset_fpcs) not in (1, count):
            raise ValueError(
                f"dataset_fpcs has {len(self.dataset_fpcs)} entries for {count} datasets; expected one for "
                "all or one a dataset"
            )
        if count and len(self.dataset_fpcs) == 1:
            self.dataset_fpcs = self.dataset_fpcs * count
        if self.datasets_weights is not None:
            if len(self.datasets_weights) != count:
                raise ValueError(
                    f"datasets_weights has {len(self.datasets_weights)} entries for {count} datasets; expected one a "
                    "dataset, or null"
                )
            if min(self.datasets_weights) < 0 or sum(self.datasets_weights) <= 0:
                raise ValueError(f"datasets_weights is {self.datasets_weights}; expected weights >= 0 with a sum > 0")
        for fpc in self.dataset_fpcs:
            if fpc != 1 and fpc % self.tubelet_size:
                raise ValueError(f"dataset_fpcs holds {fpc}, which tubelet_size {self.tubelet_size} does not divide")
        for side in self.crop_size:
            if side % self.patch_size:
                raise ValueError(f"crop_size {side} is not a multiple of patch_size {self.patch_size}")
        return self

    def per_process(self, world_size: int) -> int:
        """Clips per process and step."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.global_batch_size is not None
        if self.global_batch_size % world_size:
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} is not a multiple of {world_size} processes"
            )
        return self.global_batch_size // world_size


class ImageDataConfig(Section):
    """Images to train on together with videos (V-JEPA 2.1). What is not here is as in `data`."""

    datasets: Annotated[list[str], BeforeValidator(as_list)] = []
    """As data.datasets; a video stands for one of its frames."""
    datasets_weights: list[float] | None = None
    batch_size: PositiveInt = 72
    """Images of a step: so many times rank_ratio for each process."""
    rank_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the loss that images have. In the reference it is the share of the processes that train on images."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding processes per training process; None: as data.num_workers."""

    @property
    def per_process(self) -> int:
        """Images of one process in a step."""
        return int(self.batch_size * self.rank_ratio)
