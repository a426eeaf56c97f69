"""Encodes one video as members of a shard: decodes and checks every frame, scales and compresses the pack's."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from vjepa_fast.data.decode.convert import ToPixels
from vjepa_fast.data.decode.index import DecodeError, VideoIndex, build_index, open_video, reading
from vjepa_fast.data.decode.jpeg import decode_jpegs
from vjepa_fast.data.decode.pyav import decode_image
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.sampling import Box
from vjepa_fast.data.video_lists import is_image

_SIDE_MULTIPLE = 32
# What a JPEG file can hold.
_MAX_SIDE = 65500
_SAMPLED_EVERY = 16


@dataclass
class Encoded:
    """What became of one video.

    Attributes:
        height, width: pixels of a packed frame.
        fps, phases: see vjepa_fast.data.pack.index.PackedFrames.
        sizes, crcs: bytes and CRC-32 of every JPEG file.
        squared_error: sum over the sampled frames of the mean squared difference to what was compressed, over RGB.
        num_sampled: frames sampled, the first of every 16.
    """

    height: int
    width: int
    fps: float
    phases: int
    sizes: list[int]
    crcs: list[int]
    squared_error: float = 0.0
    num_sampled: int = 0


def packed_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of a packed frame.

    The shorter side becomes `short_side`, both keep their ratio, then each is rounded to a multiple of 32, the sides
    that decoders in hardware take without padding. Nothing is enlarged; a side below 32 stays as it is.
    """
    scale = min(1.0, short_side / min(height, width))

    def one(side: int) -> int:
        blocks = min(int(side * scale / _SIDE_MULTIPLE + 0.5), side // _SIDE_MULTIPLE)
        return max(1, blocks) * _SIDE_MULTIPLE if side >= _SIDE_MULTIPLE else side

    return one(height), one(width)


def packed_frames(num_frames: int, avg_fps: float, settings: PackSettings) -> tuple[np.ndarray, float, int]:
    """Which frames of a video are packed: the nearest to k / rate seconds, of two equally near the earlier one.

    Args:
        num_frames, avg_fps: of the video.
        settings: of the pack.

    Returns:
        Frame numbers int64 [N] ascending, frames per second of one phase, number of phases. A video slower than the
        rate of the clips keeps all its frames; one slower than twice that rate, or too short for two, has one phase.
    """
    if avg_fps <= settings.fps:
        return np.arange(num_frames), avg_fps, 1
    for phases in (2, 1) if settings.two_phase and avg_fps >= 2 * settings.fps else (1,):
        spacing = avg_fps / (settings.fps * phases)
        numbers = np.ceil(np.arange(int(num_frames / spacing) + 2) * spacing - 0.5).astype(np.int64)
        numbers = numbers[numbers < num_frames]
        # No phase may be empty.
        if len(numbers) >= phases:
            break
    return numbers, settings.fps, phases


def encode_video(path: str, label: Any, key: str, settings: PackSettings, out: BinaryIO) -> Encoded:
    """Writes the members `<key>.<frame>.jpg` and `<key>.json` of a video or an image.

    Args:
        path, label: from the manifest.
        key: names the members.
        settings: of the pack.
        out: is written from its beginning.

    Raises:
        DecodeError: it cannot be used, or one of its frames cannot be decoded.
    """
    if is_image(path):
        image = decode_image(path)
        source_fps, height, width = 0.0, *image.shape[:2]
        numbers, fps, phases = np.zeros(1, dtype=np.int64), 0.0, 0
        pictures: Iterator[np.ndarray] = iter([image])
    else:
        index = build_index(path)
        if not index.avg_fps > 0:
            raise DecodeError("its frame rate is unknown")
        source_fps, height, width = index.avg_fps, index.height, index.width
        numbers, fps, phases = packed_frames(index.num_frames, index.avg_fps, settings)
        pictures = rgb_frames(path, index, numbers)
    packed = Encoded(*packed_size(height, width, settings.short_side), fps, phases, [], [])
    if max(packed.height, packed.width) > _MAX_SIDE:
        raise DecodeError(f"{width} x {height} pixels are more than a JPEG file can hold")
    for number, picture in enumerate(pictures):
        data = _compress(picture, packed, settings, is_sampled=number % _SAMPLED_EVERY == 0)
        packed.sizes.append(len(data))
        packed.crcs.append(zlib.crc32(data))
        _write_member(out, f"{key}.{number:06d}.jpg", data)
    about = {
        "label": label,
        "path": path,
        "num_frames": len(packed.sizes),
        "fps": fps * max(1, phases),
        "phases": phases,
        "height": packed.height,
        "width": packed.width,
        "source": {"fps": source_fps, "height": height, "width": width, "frames": numbers.tolist()},
    }
    _write_member(out, f"{key}.json", json.dumps(about).encode())
    return packed


def rgb_frames(path: str, index: VideoIndex, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Decodes all of a video, and gives some of its frames, with the colours that the loader gives them.

    Args:
        path, index: of the video.
        numbers: int64 [N] ascending, those wanted.

    Yields:
        uint8 [H, W, 3].

    Raises:
        DecodeError: any frame, wanted or not, is missing or reported as damaged.
    """
    wanted = set(numbers.tolist())
    size = index.height, index.width
    to_rgb = ToPixels(index, Box(0, 0, *size), size, flip=False)
    number_of = {int(pts): number for number, pts in enumerate(index.pts)} if index.seekable else None
    expected = 0
    with reading(path), open_video(path) as (container, stream):
        for frame in container.decode(stream):
            number = expected if number_of is None else number_of.get(frame.pts, -1)
            if number < 0:
                # Displayed before the first keyframe: the index does not count it.
                continue
            if number != expected:
                break
            if frame.is_corrupt:
                raise DecodeError(f"frame {number} of {index.num_frames} is damaged")
            expected += 1
            if number in wanted:
                yield to_rgb(frame)[0].numpy()
    if expected < index.num_frames:
        raise DecodeError(f"frame {expected} of {index.num_frames} cannot be decoded")


def _compress(picture: np.ndarray, packed: Encoded, settings: PackSettings, is_sampled: bool) -> bytes:
    image = Image.fromarray(picture)
    if image.size != (packed.width, packed.height):
        image = image.resize((packed.width, packed.height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    # Huffman tables of its own make a frame 4 % smaller, for half a millisecond.
    image.save(buffer, "JPEG", quality=settings.quality, subsampling="4:2:0", optimize=True)
    data = buffer.getvalue()
    if is_sampled:
        difference = np.asarray(image, dtype=np.float64) - decode_jpegs([data], packed.height, packed.width)[0]
        packed.squared_error += float(np.mean(difference**2))
        packed.num_sampled += 1
    return data


def _write_member(out: BinaryIO, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    out.write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    out.write(data)
    out.write(bytes(-len(data) % tarfile.BLOCKSIZE))
