"""Indexes a video: where its frames are and what they depend on, from container and headers, without decoding.

An index costs one pass over the file's packets (5 to 11 ms for ten seconds of 360p) and is kept in a cache folder under
a name made of the file's absolute path, size and modification time, so a changed file gets a new one. An entry that
is damaged or of another version is built again; a cache that cannot be written is done without.

A stream in which a displayed frame has no timestamp, or shares it with another, cannot be sought exactly. Its frames
are counted by decoding it once, and it is decoded from the beginning every time (`VideoIndex.seekable` is False).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from vjepa_fast.common.cache_dir import default_cache_dir
from vjepa_fast.data.decode.droppable_packets import DisposableFinder

_VERSION = 3
# A stream is cut short when its frames end before this fraction of the duration it declares.
_MIN_COVERED = 0.9


class DecodeError(Exception):
    """A video or image that cannot be used; the message is the reason, without the path."""


@dataclass(frozen=True)
class VideoIndex:
    """Frames in presentation order.

    Attributes:
        num_frames: displayed frames.
        avg_fps: frames per second as the container states them; 0 where nothing says so.
        width, height: pixels, before any rotation.
        pts: int64 [num_frames] ascending, in the stream's time base; empty if not seekable.
        keyframes: int64 [K] ascending numbers of the frames at which decoding can start.
        keyframe_dts: int64 [K], their decoding timestamps, by which containers seek.
        disposable: bool [num_frames], frames without whose packets all others decode to the same bits (see
            vjepa_fast.data.decode.droppable_packets); empty if not seekable.
        codec: FFmpeg's name of it.
    """

    num_frames: int
    avg_fps: float
    width: int
    height: int
    pts: np.ndarray
    keyframes: np.ndarray
    keyframe_dts: np.ndarray
    disposable: np.ndarray
    codec: str

    @property
    def seekable(self) -> bool:
        return len(self.pts) > 0


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what goes wrong inside into a DecodeError with a reason that a user can act on."""
    try:
        yield
    except DecodeError:
        raise
    except FileNotFoundError as error:
        raise DecodeError("the file does not exist") from error
    except av.error.FFmpegError as error:
        raise DecodeError(f"FFmpeg cannot read it: {error.strerror}") from error
    except OSError as error:
        raise DecodeError(f"it cannot be read: {error.strerror or error}") from error
    except (MemoryError, Image.DecompressionBombError) as error:
        raise DecodeError(f"it is too large: {str(error) or 'there is no memory for it'}") from error
    except (ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        # Pillow raises these for damaged files, PyAV an IndexError too.
        raise DecodeError(f"it is damaged: {str(error) or type(error).__name__}") from error


# Before PyAV 19 metadata that is no UTF-8 was an error unless one said otherwise, later ones know no such argument.
_ANY_METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextlib.contextmanager
def open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first moving-picture stream, set to decode in one thread."""
    # The prefix keeps FFmpeg from reading a name that holds a colon as an address.
    with av.open(f"file:{path}", **_ANY_METADATA) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise DecodeError("it has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise DecodeError("no decoder for its codec")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def build_index(path: str) -> VideoIndex:
    """Reads a video's packets.

    Raises:
        DecodeError: missing, empty, not a video, audio only, truncated.
    """
    with reading(path):
        if os.stat(path).st_size == 0:
            raise DecodeError("the file is empty")
        with open_video(path) as (container, stream):
            _check_complete(path, stream)
            codec = stream.codec_context
            finder = DisposableFinder(codec.name, codec.extradata)
            packets = []
            for p in container.demux(stream):
                if p.size:
                    finder.add(bytes(p))
                    packets.append((p.pts, p.dts, p.is_keyframe, p.is_discard, p.is_corrupt, p.duration or 0))
            entries = stream.index_entries
            claims_keyframe = len(entries) > 0 and entries[0].is_keyframe
            width, height = codec.width, codec.height
            rate, time_base, codec_name = stream.average_rate, stream.time_base, codec.name
            duration = _declared_duration(stream)
            # AVI has no room for presentation timestamps; FFmpeg makes them up, in storage order for these codecs.
            made_up = container.format.name == "avi" and codec_name in ("h264", "hevc") and codec.has_b_frames
        if not packets or not width or not height:
            raise DecodeError("its video stream is empty")
        if packets[-1][4]:
            raise DecodeError("it is truncated: its last frame is incomplete")
        shown = [p for p in packets if not p[3]]
        times = {p[0] for p in shown}
        is_exact = None not in times and len(times) == len(shown) and any(p[2] for p in shown) and not made_up
        # VP8 has packets that are never displayed and look like any other.
        if not is_exact or codec_name == "vp8":
            return _count_frames(path, float(rate or 0), codec_name)
        if claims_keyframe and not packets[0][2]:
            # The pictures before the first keyframe are left out below, which must not hide that they are damaged.
            _check_leading(path)
        keys = sorted((p[0], p[0] if p[1] is None else p[1]) for p in packets if p[2])
        # What is displayed before the first keyframe refers to pictures that the file does not hold.
        shown = sorted(p for p in shown if p[0] >= keys[0][0])
        pts = np.array([p[0] for p in shown], dtype=np.int64)
        if duration and float((pts[-1] + shown[-1][5] - pts[0]) * time_base) < _MIN_COVERED * duration:
            raise DecodeError("it is truncated: its frames end before its declared duration")
        if not rate and len(pts) > 1:
            rate = (len(pts) - 1) / float((pts[-1] - pts[0]) * time_base)
        key_pts = np.array([k[0] for k in keys], dtype=np.int64)
        numbers = np.searchsorted(pts, key_pts)
        exact = (numbers < len(pts)) & (pts[np.minimum(numbers, len(pts) - 1)] == key_pts)
        keyframe_dts = np.array([k[1] for k in keys], dtype=np.int64)
        not_needed = [p[0] for p, found in zip(packets, finder.found(), strict=True) if found and not p[3]]
        return VideoIndex(
            len(pts),
            float(rate or 0),
            width,
            height,
            pts,
            numbers[exact],
            keyframe_dts[exact],
            np.isin(pts, not_needed),
            codec_name,
        )


def _check_leading(path: str) -> None:
    """Decodes what is stored before the first keyframe."""
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_keyframe:
                return
            if any(frame.is_corrupt for frame in stream.codec_context.decode(packet)):
                raise DecodeError("its first pictures are damaged")


def _check_complete(path: str, stream: Any) -> None:
    entries = stream.index_entries
    size = os.path.getsize(path)
    if len(entries):
        last = entries[len(entries) - 1]
        if last.pos + last.size > size:
            raise DecodeError(f"it is truncated: {size} bytes of at least {last.pos + last.size}")


def _declared_duration(stream: Any) -> float:
    """Seconds; 0 where the container does not say."""
    text = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _count_frames(path: str, rate: float, codec: str) -> VideoIndex:
    none = np.zeros(0, dtype=np.int64)
    count, width, height = 0, 0, 0
    with open_video(path) as (container, stream):
        for frame in container.decode(stream):
            if not count:
                width, height = frame.width, frame.height
            count += 1
    if not count:
        raise DecodeError("none of its frames can be decoded")
    return VideoIndex(count, rate, width, height, none, none, none, none.astype(bool), codec)


def load_index(path: str, cache_dir: Path | None = None) -> VideoIndex:
    """The index of a video, from the cache where it is there.

    Args:
        path: of the video.
        cache_dir: None is default_cache_dir().

    Raises:
        DecodeError: see build_index.
    """
    with reading(path):
        status = os.stat(path)
    key = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    name = hashlib.sha256(os.fsencode(key)).hexdigest()
    file = (cache_dir or default_cache_dir()) / "index" / name[:2] / f"{name[2:]}.idx"
    index = _read(file)
    if index is None:
        index = build_index(path)
        # A full or read-only disk costs time, not the run.
        with contextlib.suppress(OSError):
            _write(file, index)
    return index


def _write(file: Path, index: VideoIndex) -> None:
    arrays = [index.pts, index.keyframes, index.keyframe_dts, np.flatnonzero(index.disposable)]
    body = b"".join(array.astype("<i8").tobytes() for array in arrays)
    header = json.dumps(
        {
            "version": _VERSION,
            "crc": zlib.crc32(body),
            "lengths": [len(array) for array in arrays],
            "frame": [index.num_frames, index.avg_fps, index.width, index.height, index.codec],
        }
    ).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(header + b"\n" + body)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(file: Path) -> VideoIndex | None:
    try:
        header, _, body = file.read_bytes().partition(b"\n")
        meta = json.loads(header)
        if meta["version"] != _VERSION or meta["crc"] != zlib.crc32(body):
            return None
        values = np.frombuffer(body, dtype="<i8").astype(np.int64)
        pts, keyframes, keyframe_dts, not_needed = np.split(values, np.cumsum(meta["lengths"])[:-1])
        num_frames, avg_fps, width, height, codec = meta["frame"]
        disposable = np.isin(np.arange(len(pts)), not_needed)
        return VideoIndex(num_frames, avg_fps, width, height, pts, keyframes, keyframe_dts, disposable, codec)
    except (OSError, ValueError, KeyError, TypeError):
        return None
