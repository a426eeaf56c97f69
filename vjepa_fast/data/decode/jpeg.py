"""Decodes clips from JPEG files on the CPU with Pillow (libjpeg-turbo).

A file goes straight into libjpeg, without Pillow's reading of its header: a third less time on frames of 448 x 256.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.pyav import resize_clip
from vjepa_fast.data.decode.request import ClipRequest, JpegSource
from vjepa_fast.data.sampling import Box


def decode_jpeg_clip(request: ClipRequest) -> Tensor:
    """What a request of a JpegSource stands for, uint8 [T, H, W, 3], contiguous.

    Raises:
        DecodeError: a frame cannot be read or decoded.
    """
    source = request.source
    assert isinstance(source, JpegSource)
    # A still image, and a video shorter than the clip, show a frame more than once.
    wanted, places = np.unique(request.frame_numbers, return_inverse=True)
    frames = decode_jpegs(source.read_jpegs(wanted), source.height, source.width, request.box)
    clip = resize_clip(frames, request.size, request.flip)
    return clip if np.array_equal(wanted, request.frame_numbers) else clip[torch.from_numpy(places)]


def decode_jpeg_clips(requests: Sequence[ClipRequest]) -> list[Tensor]:
    """`decode_jpeg_clip` of each request; a frame that several take from one source is decoded once."""
    if len(requests) == 1:
        return [decode_jpeg_clip(requests[0])]
    images: dict[int, dict[int, Image.Image]] = {}
    for source in {id(request.source): request.source for request in requests}.values():
        assert isinstance(source, JpegSource)
        wanted = np.unique([request.frame_numbers for request in requests if request.source is source])
        files = source.read_jpegs(wanted)
        images[id(source)] = {
            number: _decode(file, Image.new("RGB", (source.width, source.height), None))
            for number, file in zip(wanted.tolist(), files, strict=True)
        }
    clips = []
    for request in requests:
        wanted, places = np.unique(request.frame_numbers, return_inverse=True)
        corners = _corners(request.box)
        own = images[id(request.source)]
        frames = np.stack([np.asarray(own[number].crop(corners)) for number in wanted.tolist()])
        clips.append(resize_clip(frames, request.size, request.flip)[torch.from_numpy(places)])
    return clips


def decode_jpegs(files: Sequence[bytes], height: int, width: int, box: Box | None = None) -> np.ndarray:
    """Frames of one size as RGB, by libjpeg-turbo's exact methods (slow integer DCT, smooth chroma).

    Args:
        files: JPEG files, each of the size given.
        height, width: pixels.
        box: part of the frames to return; None is all of it.

    Returns:
        uint8 [T, height, width, 3], or [T, box.height, box.width, 3].

    Raises:
        DecodeError: a file is damaged.
    """
    box = box or Box(0, 0, height, width)
    corners = _corners(box)
    frames = np.empty((len(files), box.height, box.width, 3), dtype=np.uint8)
    # One image for all frames: new memory for each would cost a twentieth more.
    image = Image.new("RGB", (width, height), None)
    for number, file in enumerate(files):
        frames[number] = np.asarray(_decode(file, image).crop(corners))
    return frames


def _decode(file: bytes, image: Image.Image) -> Image.Image:
    """The image, filled with what a file of its size holds."""
    try:
        image.frombytes(file, "jpeg", "RGB", "")
    except (ValueError, OSError) as error:
        raise DecodeError(f"one of its JPEG files is damaged: {error}") from error
    return image


def _corners(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.left + box.width, box.top + box.height
