"""Reads frames of a pack for the loader."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.pack.index import INDEX_NAME, PackIndex, read_index, shard_name
from vjepa_fast.data.pack.shards import LocalShards, Range, RemoteShards, Shards
from vjepa_fast.data.sampling import clip_step

UNFINISHED = ".unfinished"
# A clip may be this much faster or slower than configured: what the sampling rule allows itself on 30 frames/s.
_MAX_RATE_ERROR = 0.1
_START, _END = b"\xff\xd8", b"\xff\xd9"


def is_pack(name: str) -> bool:
    """Whether an entry of `data.datasets` is a pack, finished or not, or an address (which can be nothing else)."""
    return is_address(name) or any(os.path.exists(os.path.join(name, part)) for part in (INDEX_NAME, UNFINISHED))


def is_address(name: str) -> bool:
    """Whether a name goes to fsspec."""
    return "://" in name


class Pack:
    """A pack that is read: a FrameSource (vjepa_fast.data.frame_sources).

    Args:
        name: folder, or address.
        cache_dir: where the index of a remote one is kept; None is default_cache_dir().

    Raises:
        UserError: it is no pack, or unfinished, or its index is damaged.
    """

    def __init__(self, name: str, cache_dir: Path | None = None) -> None:
        self.name = name
        self._cache_dir = cache_dir
        self._shards: Shards
        if is_address(name):
            self._shards = remote = RemoteShards(name)
            path = remote.cached_index(cache_dir)
            try:
                self.index: PackIndex = read_index(path, name)
            except UserError:
                # It may be the copy alone that is damaged.
                with contextlib.suppress(OSError):
                    path.unlink()
                self.index = read_index(remote.cached_index(cache_dir), name)
        else:
            self._shards, path = LocalShards(name), Path(name) / INDEX_NAME
            if not path.exists():
                raise UserError(
                    f"pack {name!r} is unfinished; run the `vjepa-fast pack` command that began it again to finish it"
                )
            self.index = read_index(path, name)
        self.index_file = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Pack, (self.name, self._cache_dir)

    @staticmethod
    def recognises(name: str) -> bool:
        """See is_pack."""
        return is_pack(name)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def paths(self) -> Sequence[str]:
        """Where the videos come from."""
        return self.index.paths

    @property
    def labels(self) -> list[Any]:
        """One a video."""
        return self.index.labels

    def check_fps(self, fps: float | None) -> None:
        """Refuses a rate of clips that cannot be taken from these frames.

        Args:
            fps: data.fps; None where it does not decide.

        Raises:
            ConfigError: it is off by more than a tenth.
        """
        if fps is None:
            return
        own = self.index.settings.fps
        clips = own / clip_step(own, 1, fps=fps)
        if abs(clips / fps - 1) > _MAX_RATE_ERROR:
            raise ConfigError(
                f"data.fps is {fps:g}, but pack {self.name!r} holds {own:g} frames a second, and "
                f"clips would show {clips:g}; expected data.fps={own:g} or a whole fraction of it, a "
                f"pack made with --fps {fps:g}, or data.frame_step in place of data.fps"
            )

    def num_phases(self, video: int) -> int:
        """In how many sequences a video's frames are dealt out in turn; 0 for an image."""
        first, end = self.index.video_first[video : video + 2].tolist()
        # Earlier packs say two also of a video with a single frame.
        return min(int(self.index.video_phases[video]), end - first)

    def open(self, video: int, phase: int = 0) -> PackedVideo:
        """One phase of a video: every num_phases-th of its frames, from frame number `phase` on."""
        index = self.index
        stride = max(1, self.num_phases(video))
        count = int(index.video_first[video + 1] - index.video_first[video])
        assert 0 <= phase < stride
        return PackedVideo(
            self,
            video,
            phase,
            index.paths[video],
            -(-(count - phase) // stride),
            float(index.video_fps[video]),
            int(index.video_width[video]),
            int(index.video_height[video]),
            self.num_phases(video) == 0,
        )

    def file_of(self, video: int) -> tuple[str, str]:
        """The index, which holds a checksum of every frame, and the number of the video."""
        return os.path.abspath(self.index_file), str(video)

    def read(self, video: int, frames: np.ndarray) -> list[bytes]:
        """The files of some frames of a video.

        Args:
            video: counted from 0.
            frames: int64 [N], numbers within the video, ascending, no repeats.

        Raises:
            DecodeError: the shard is missing, truncated or damaged; the message names it.
        """
        index = self.index
        shard = int(index.video_shard[video])
        places = index.video_first[video] + frames
        starts = index.frame_offset[places].tolist()
        sizes = index.frame_bytes[places].tolist()
        ranges, run_of = _runs(starts, sizes, self._shards.max_gap)
        runs = [memoryview(data) for data in self._shards.read(shard_name(shard), ranges)]
        files = []
        for start, size, crc, run in zip(starts, sizes, index.frame_crc[places].tolist(), run_of, strict=True):
            begin = start - ranges[run][0]
            data = bytes(runs[run][begin : begin + size])
            if len(data) != size:
                raise DecodeError(
                    f"{shard_name(shard)} of pack {self.name} is truncated: it ends before byte "
                    f"{start + size} of {index.shard_bytes[shard]}"
                )
            if data[:2] != _START or data[-2:] != _END or zlib.crc32(data) != crc:
                raise DecodeError(
                    f"{shard_name(shard)} of pack {self.name} is damaged at byte {start}: what lies "
                    "there is not the frame that was packed"
                )
            files.append(data)
        return files


@dataclass(frozen=True, eq=False)
class PackedVideo:
    """A JpegSource (vjepa_fast.data.decode.request): one phase of a video of a pack."""

    pack: Pack
    number: int
    phase: int
    path: str
    num_frames: int
    avg_fps: float
    width: int
    height: int
    is_image: bool

    def read_jpegs(self, frame_numbers: np.ndarray) -> list[bytes]:
        """See JpegSource."""
        wanted, places = np.unique(np.asarray(frame_numbers, dtype=np.int64), return_inverse=True)
        assert len(wanted) and wanted[0] >= 0 and wanted[-1] < self.num_frames
        stride = max(1, self.pack.num_phases(self.number))
        files = self.pack.read(self.number, wanted * stride + self.phase)
        return [files[place] for place in places.tolist()]


def _runs(starts: Sequence[int], sizes: Sequence[int], max_gap: int) -> tuple[list[Range], list[int]]:
    """Ranges that hold all of some files, in one where they lie close together; and the range of each file."""
    ranges: list[Range] = []
    run_of = []
    for start, size in zip(starts, sizes, strict=True):
        if ranges and start - ranges[-1][1] <= max_gap:
            ranges[-1] = ranges[-1][0], start + size
        else:
            ranges.append((start, start + size))
        run_of.append(len(ranges) - 1)
    return ranges, run_of
