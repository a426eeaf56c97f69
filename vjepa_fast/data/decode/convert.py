"""Converts decoded frames (av.VideoFrame) to RGB with FFmpeg, or to clip pixels straight from the planes."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from vjepa_fast.data.decode.index import DecodeError, VideoIndex
from vjepa_fast.data.sampling import Box
from vjepa_fast.ops.clip_pixels import CHROMA_444, MAX_DEPTH, MAX_SIDE, Chroma, clip_pixels, colour_ints

# Steps down and across of chroma, by the digits of a format's name.
_STEPS = {"420": (2, 2), "422": (1, 2), "444": (1, 1), "440": (2, 1), "411": (1, 4), "410": (4, 4)}
# FFmpeg's numbers of colour spaces (ITU-T H.273, table 4). Others, which are no matrix, are left to FFmpeg.
_MATRICES = {1: "bt709", 2: "bt601", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
_LIMITED, _FULL = 1, 2
# Chroma lies in the middle of its luma samples; elsewhere, unless a stream says otherwise, it lies at the left ones.
_CENTRED_CODECS = ("mjpeg", "mpeg1video")


class _Layout(NamedTuple):
    """How the samples of a format lie; without chroma steps it is gray."""

    steps: tuple[int, int] | None
    depth: int
    num_planes: int
    is_full_range: bool


@cache
def _layout(name: str) -> _Layout | None:
    """Layout of a pixel format by FFmpeg's name; None: clip_pixels does not take it."""
    if name == "nv12":
        return _Layout(_STEPS["420"], 8, 2, False)
    found = re.fullmatch(r"(?:yuv(j?)(\d{3})p|(gray))(?:(\d+)le)?", name)
    if found is None:
        return None
    is_jpeg, digits, gray, bits = found.groups()
    depth = int(bits or 8)
    if depth > MAX_DEPTH or (digits and digits not in _STEPS):
        return None
    # FFmpeg takes gray for full range too, if nothing says otherwise.
    return _Layout(_STEPS[digits] if digits else None, depth, 3 if digits else 1, bool(is_jpeg or gray))


class ToRgb:
    """uint8 [H, W, 3], or the part of it in a box: by one swscale context in one thread, which by default every frame
    gets anew and with threads."""

    def __init__(self, index: VideoIndex, box: Box | None) -> None:
        self._size = index.width, index.height
        self._box = box or Box(0, 0, index.height, index.width)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        top, left, height, width = self._box
        # A stream may change its size on the way; every frame takes the size of the index.
        rgb = self._reformatter.reformat(frame, *self._size, format="rgb24", threads=1).to_ndarray()
        return rgb[top : top + height, left : left + width]


class ToPixels:
    """uint8 [1, S_h, S_w, 3] by vjepa_fast.ops.clip_pixels, without an RGB frame.

    What that does not take (palettes, RGB, alpha, more than 14 bits, colour spaces that are no matrix, frames of
    another size than the index says, sides above 2**15) is converted to RGB by FFmpeg first.

    Args:
        index: of the video.
        box: part of the frames to keep.
        size: height and width of the result.
        flip: mirror left to right.
    """

    def __init__(self, index: VideoIndex, box: Box, size: tuple[int, int], flip: bool) -> None:
        self._index, self._box, self._size, self._flip = index, box, size, flip
        self._to_rgb = ToRgb(index, None)

    def __call__(self, frame: Any) -> Tensor:
        planes = frame.planes
        layout, matrix = _layout(frame.format.name), _MATRICES.get(int(frame.colorspace))
        same_size = (frame.width, frame.height) == (self._index.width, self._index.height)
        is_large = max(frame.width, frame.height) > MAX_SIDE
        if (
            layout is None
            or matrix is None
            or not same_size
            or is_large
            or any(plane.line_size <= 0 for plane in planes)
        ):
            return rgb_pixels(self._to_rgb(frame), self._box, self._size, self._flip)
        tag = int(frame.color_range)
        is_full_range = tag == _FULL or (layout.is_full_range and tag != _LIMITED)
        y, *rest = (_samples(plane, layout.depth > 8) for plane in planes)
        y = y[:, :, : frame.width]
        if layout.steps is None:
            return clip_pixels(
                y,
                y,
                y,
                self._box,
                self._size,
                flip=self._flip,
                depth=layout.depth,
                chroma=CHROMA_444,
                colour=colour_ints("gray", is_full_range, layout.depth),
            )
        width = -(-frame.width // layout.steps[1])
        if layout.num_planes == 2:
            u, v = rest[0][:, :, : 2 * width : 2], rest[0][:, :, 1 : 2 * width : 2]
        else:
            u, v = (plane[:, :, :width] for plane in rest)
        down, across = layout.steps
        site = across - 1 if self._index.codec in _CENTRED_CODECS else 0
        return clip_pixels(
            y,
            u,
            v,
            self._box,
            self._size,
            flip=self._flip,
            depth=layout.depth,
            chroma=Chroma(down, across, down - 1, site),
            colour=colour_ints(matrix, is_full_range, layout.depth),
        )


def rgb_pixels(rgb: np.ndarray, box: Box, size: tuple[int, int], flip: bool) -> Tensor:
    """Crop, resize and flip RGB: uint8 [H, W, 3] to [1, S_h, S_w, 3].

    Raises:
        DecodeError: the box has a side that clip_pixels does not take.
    """
    top, left, height, width = box
    if max(height, width) > MAX_SIDE:
        raise DecodeError(f"a crop of {width} x {height} pixels is too large; {MAX_SIDE} a side are the most")
    # Cut out here, so that the whole picture may be larger than that.
    red, green, blue = torch.from_numpy(rgb[top : top + height, left : left + width])[None].unbind(-1)
    return clip_pixels(
        red, green, blue, (0, 0, height, width), size, flip=flip, chroma=CHROMA_444, colour=colour_ints("rgb")
    )


def _samples(plane: Any, is_wide: bool) -> Tensor:
    """[1, rows, samples a line] of a plane, padding included, in the decoder's own memory."""
    lines = np.frombuffer(plane, np.uint8).reshape(1, plane.height, plane.line_size)
    return torch.from_numpy(lines.view(np.uint16) if is_wide else lines)
