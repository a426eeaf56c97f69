"""A decoder's request: a source, and the frames, crop, size and flip that vjepa_fast.data.sampling chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vjepa_fast.data.decode.index import VideoIndex, load_index, reading
from vjepa_fast.data.sampling import Box
from vjepa_fast.data.video_lists import is_image


class Source(Protocol):
    """What frames are taken from. `avg_fps` is 0 where nothing says so; `width` and `height` are pixels.

    An image (`is_image`) has one frame, which a clip shows throughout.
    """

    @property
    def path(self) -> str: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def avg_fps(self) -> float: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def is_image(self) -> bool: ...


@runtime_checkable
class JpegSource(Source, Protocol):
    """A video that is kept as one JPEG file a frame."""

    def read_jpegs(self, frame_numbers: np.ndarray) -> Sequence[bytes]:
        """The files of some frames, int64 [T], any order, repeats allowed.

        Raises:
            DecodeError: one of them cannot be read.
        """
        ...


@dataclass(frozen=True)
class VideoSource:
    """A video file."""

    path: str
    index: VideoIndex
    is_image: bool = False

    @property
    def num_frames(self) -> int:
        return self.index.num_frames

    @property
    def avg_fps(self) -> float:
        return self.index.avg_fps

    @property
    def width(self) -> int:
        return self.index.width

    @property
    def height(self) -> int:
        return self.index.height


@dataclass(frozen=True)
class ImageSource:
    """An image file."""

    path: str
    width: int
    height: int
    num_frames: int = 1
    avg_fps: float = 0.0
    is_image: bool = True


@dataclass(frozen=True, eq=False)
class ClipRequest:
    """One clip.

    Attributes:
        source: VideoSource, ImageSource or a JpegSource.
        frame_numbers: int64 [T], each in [0, source.num_frames), any order, repeats allowed.
        box: part of the frames to keep, within the source's width and height.
        size: height and width in pixels to which the box is resized.
        flip: mirror left to right.
    """

    source: Source
    frame_numbers: np.ndarray
    box: Box
    size: tuple[int, int]
    flip: bool


def open_source(path: str, cache_dir: Path | None = None) -> Source:
    """The source that an entry of a manifest stands for; reads what says how large and how long it is.

    Args:
        path: of the entry.
        cache_dir: where keyframe indices are kept; None is default_cache_dir().

    Raises:
        DecodeError: it cannot be used.
    """
    if is_image(path):
        with reading(path), Image.open(path) as image:
            return ImageSource(path, *image.size)
    return VideoSource(path, load_index(path, cache_dir))
