"""The index of a pack: one memory-mapped file.

    vjepa-fast pack 1\\n     what it is, and the version
    {...}\\n                 JSON: settings, digest of the manifest, name, type and length of the arrays, CRC-32 of them
    arrays                  little endian, each at a multiple of 64 bytes

An index is a function of the manifest's files and the settings alone: packing again gives the same bytes.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.path_list import PathList

INDEX_NAME = "pack.index"
_MAGIC = b"vjepa-fast pack 1\n"
_ALIGNMENT = 64
_BLOCK = 512
# Fields of PackIndex, and their type in the file.
_ARRAYS = {
    "shard_bytes": "<i8",
    "video_number": "<i8",
    "video_first": "<i8",
    "video_fps": "<f8",
    "video_shard": "<i4",
    "video_height": "<u2",
    "video_width": "<u2",
    "video_phases": "|u1",
    "frame_offset": "<i8",
    "frame_bytes": "<u4",
    "frame_crc": "<u4",
    "path_ends": "<i8",
    "path_text": "|u1",
    "label_text": "|u1",
}


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a pack, beside the files.

    Attributes:
        fps: of a clip; a slower video keeps all its frames.
        short_side: pixels; a smaller video keeps its size, but for whole blocks.
        quality: of the JPEG files, as libjpeg counts.
        two_phase: frames at twice the rate, so that a clip can start half a period later.
        shard_bytes: a shard ends before the video that would make it larger.
    """

    fps: float = 4.0
    short_side: int = 256
    quality: int = 90
    two_phase: bool = False
    shard_bytes: int = 1 << 30


@dataclass(frozen=True)
class PackedFrames:
    """What the index holds of one video.

    Attributes:
        number: its place in the manifest.
        height, width: pixels.
        fps: frames per second of one phase; 0 for an image.
        phases: how many sequences its frames are taken from in turn; 0 for an image.
        sizes: bytes of every file.
        crcs: CRC-32 of every file.
        offset: in the shard, of its first member.
    """

    number: int
    height: int
    width: int
    fps: float
    phases: int
    sizes: list[int]
    crcs: list[int]
    offset: int

    def data_offsets(self) -> np.ndarray:
        """int64 [number of frames]: where the file of each frame begins."""
        sizes = np.asarray(self.sizes, dtype=np.int64)
        members = _BLOCK + -(-sizes // _BLOCK) * _BLOCK
        return self.offset + _BLOCK + np.cumsum(members) - members


@dataclass(frozen=True, eq=False)
class PackIndex:
    """V videos with F frames in S shards; names as in PackedFrames.

    Attributes:
        settings: as it was packed.
        manifest: digest of the paths and labels it was made of.
        labels: one a video.
        video_first: int64 [V + 1], where the frames of a video begin and those of the last one end.
        video_shard: int32 [V].
        frame_offset: int64 [F], of the file within the shard.
        path_ends, path_text: see `paths`.
    """

    settings: PackSettings
    manifest: str
    labels: list[Any]
    shard_bytes: np.ndarray
    video_number: np.ndarray
    video_first: np.ndarray
    video_fps: np.ndarray
    video_shard: np.ndarray
    video_height: np.ndarray
    video_width: np.ndarray
    video_phases: np.ndarray
    frame_offset: np.ndarray
    frame_bytes: np.ndarray
    frame_crc: np.ndarray
    path_ends: np.ndarray
    path_text: np.ndarray
    paths: PathList = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", PathList.of_buffers(self.path_ends, self.path_text))

    def __len__(self) -> int:
        return len(self.video_number)


def shard_name(number: int) -> str:
    """File of a shard, counted from 0."""
    return f"shard-{number:06d}.tar"


def encode_index(
    settings: PackSettings,
    manifest: str,
    shards: Sequence[tuple[int, Sequence[PackedFrames]]],
    paths: Sequence[str],
    labels: Sequence[Any],
) -> bytes:
    """The file of an index.

    Args:
        settings, manifest: see PackIndex.
        shards: of every shard its bytes and its videos.
        paths, labels: of the whole manifest, by PackedFrames.number.
    """
    videos = [video for _, shard in shards for video in shard]
    kept = PathList(paths[video.number] for video in videos)
    ends, text = kept.buffers()
    values: dict[str, Any] = {
        "shard_bytes": [size for size, _ in shards],
        "video_number": [video.number for video in videos],
        "video_first": np.cumsum([0, *(len(video.sizes) for video in videos)]),
        "video_fps": [video.fps for video in videos],
        "video_shard": np.repeat(np.arange(len(shards)), [len(shard) for _, shard in shards]),
        "video_height": [video.height for video in videos],
        "video_width": [video.width for video in videos],
        "video_phases": [video.phases for video in videos],
        "frame_offset": np.concatenate([video.data_offsets() for video in videos]),
        "frame_bytes": np.concatenate([np.asarray(video.sizes, dtype=np.int64) for video in videos]),
        "frame_crc": np.concatenate([np.asarray(video.crcs, dtype=np.int64) for video in videos]),
        "path_ends": ends,
        "path_text": np.frombuffer(text, dtype=np.uint8),
        "label_text": np.frombuffer(
            json.dumps([labels[video.number] for video in videos], separators=(",", ":")).encode(), dtype=np.uint8
        ),
    }
    body = bytearray()
    lengths = {}
    for name, kind in _ARRAYS.items():
        array = np.asarray(values[name]).astype(kind)
        lengths[name] = len(array)
        body += array.tobytes()
        body += bytes(-len(body) % _ALIGNMENT)
    header = json.dumps(
        {
            "settings": asdict(settings),
            "manifest": manifest,
            "lengths": lengths,
            "bytes": len(body),
            "crc": zlib.crc32(body),
        }
    ).encode()
    padding = -(len(_MAGIC) + len(header) + 1) % _ALIGNMENT
    return _MAGIC + header + b" " * padding + b"\n" + body


def read_index(path: Path, name: str) -> PackIndex:
    """Maps an index into memory.

    Args:
        path: of the file.
        name: of the pack, for messages.

    Raises:
        UserError: missing, of another version, or damaged.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except OSError as error:
        raise UserError(f"the index of pack {name!r} cannot be read: {error.strerror or error}") from error
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise UserError(
            f"{path} is no index of a pack, or one of another version; expected it to begin with "
            f"{_MAGIC.decode().strip()!r}. `vjepa-fast pack` of this version makes a new one"
        )
    try:
        start = header_end(data)
        header = json.loads(bytes(data[len(_MAGIC) : start]))
        body = data[start:]
        if len(body) != header["bytes"] or zlib.crc32(body) != header["crc"]:
            raise ValueError("checksum")
        arrays, offset = {}, 0
        for key, kind in _ARRAYS.items():
            arrays[key] = np.frombuffer(body, dtype=kind, count=header["lengths"][key], offset=offset)
            offset += -(-arrays[key].nbytes // _ALIGNMENT) * _ALIGNMENT
        labels = json.loads(arrays.pop("label_text").tobytes())
        return PackIndex(PackSettings(**header["settings"]), header["manifest"], labels, **arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the index of pack {name!r} is damaged: its checksum does not fit. Copy it again from where "
            "the pack was made, or make the pack again"
        ) from error


def header_end(data: memoryview | bytes) -> int:
    """Where the arrays begin.

    Raises:
        ValueError: not within `data`.
    """
    return bytes(data[: 1 << 16]).index(b"\n", len(_MAGIC)) + 1
