"""What an entry of `data.datasets` may be: one class for each kind, all of them in SOURCES.

A new kind is a class with the methods of FrameSource and a row in SOURCES; the loader, `vjepa-fast embed` and the
probes then read it. What it opens is a VideoSource, an ImageSource or a JpegSource (vjepa_fast.data.decode.request),
which both decoders know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vjepa_fast.data.decode.request import Source, open_source
from vjepa_fast.data.pack.reader import Pack
from vjepa_fast.data.path_list import PathList
from vjepa_fast.data.video_lists import read_list


class FrameSource(Protocol):
    """Some videos or images, each of which can be opened. It is pickled to reach the decoding processes."""

    def __init__(self, name: str, cache_dir: Path | None) -> None:
        """Reads what there is, but no video.

        Args:
            name: the entry, for which `recognises` is true.
            cache_dir: where a source may keep files; None is default_cache_dir().

        Raises:
            UserError: it is missing, empty, unfinished or damaged.
        """

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether an entry is of this kind; decided without reading it."""
        ...

    @property
    def paths(self) -> Sequence[str]:
        """Where each video comes from: its name in messages and in files of features."""
        ...

    @property
    def labels(self) -> list[Any]:
        """One a video; 0 where there is none."""
        ...

    def check_fps(self, fps: float | None) -> None:
        """Refuses a rate of clips that these frames cannot show.

        Args:
            fps: data.fps; None where it does not decide.

        Raises:
            ConfigError: the rate, and what to do.
        """

    def num_phases(self, video: int) -> int:
        """In how many sequences the frames of a video are dealt out in turn; 0 or 1: they are one sequence."""
        ...

    def open(self, video: int, phase: int = 0) -> Source:
        """One sequence of a video, with its size and length; called in the decoding processes.

        Args:
            video: counted from 0.
            phase: which sequence, below max(1, num_phases(video)).

        Raises:
            DecodeError: it cannot be used; another video takes its place.
        """
        ...

    def file_of(self, video: int) -> tuple[str, str]:
        """The file that changes when a video does, and where in that file the video is; empty: it is the whole file."""
        ...


class VideoFiles:
    """Video and image files, from a list of them (vjepa_fast.data.video_lists)."""

    def __init__(self, name: str, cache_dir: Path | None) -> None:
        paths, self.labels = read_list(name)
        self.paths = PathList(paths)
        self._cache_dir = cache_dir

    @staticmethod
    def recognises(name: str) -> bool:
        """Any entry that no other kind takes; reading it says what is wrong with it."""
        return True

    def check_fps(self, fps: float | None) -> None:
        """A file shows any rate: frames are left out or repeated."""

    def num_phases(self, video: int) -> int:
        """One sequence."""
        return 1

    def open(self, video: int, phase: int = 0) -> Source:
        """See FrameSource."""
        assert phase == 0
        return open_source(self.paths[video], self._cache_dir)

    def file_of(self, video: int) -> tuple[str, str]:
        """The video itself."""
        return os.path.abspath(self.paths[video]), ""


SOURCES: tuple[type[FrameSource], ...] = (Pack, VideoFiles)
"""The first one that recognises an entry reads it."""


def open_entry(name: str, cache_dir: Path | None = None) -> FrameSource:
    """The videos of an entry of `data.datasets`.

    Args:
        name: the entry.
        cache_dir: see FrameSource.

    Raises:
        UserError: see FrameSource.
    """
    return next(kind for kind in SOURCES if kind.recognises(name))(name, cache_dir)
