"""A clip out of the planes of decoded frames: crop, bilinear resize, flip and YUV to RGB in one pass, on CPU and GPU.

    vjepa_fast::clip_pixels(y, u, v, box, size, flip, depth, chroma, colour) -> uint8 [T, S_h, S_w, 3]

Only integers occur, so the compiled operator (csrc/clip_pixels.h) gives the same bits as `clip_pixels_ref` below and on
every device. No RGB frame is ever made: luma and chroma are sampled where an output pixel lies, then converted.

Place, along each axis: output pixel i of S (counted from the other end if flipped) lies at (i + 1/2) L / S - 1/2 luma
samples from the box's first one, L being the box's length, held to [0, L - 1]: F.interpolate of the cropped frame with
align_corners=False and no antialiasing. Chroma sample j lies at luma place `step` j + `site` / 2; chroma outside the
box is used as far as the frame has it. Places are rounded to 1/2048 of a sample, halves up.

Value: two samples of a column give (a (2048 - w) + b w) >> (depth - 4), 8 bits and 7 of fraction, whatever the depth;
two of those give (left (2048 - w) + right w) >> 11; the three components give (row . (y, u, v) + offset) >> 20, held to
[0, 255]. Every shift rounds, halves up. A pixel is within 1 of the formula in real numbers (0.6 on noise, of which 0.5
is the rounding to whole numbers).

Colour: from the stream's tag, BT.601 where it has none, whatever the size: so do FFmpeg's converter, which the
reference's loader uses, and DALI, and a video keeps its colours when it is scaled (players guess BT.709 from 720 lines
on). BT.2020 with constant luminance is converted as without; no transfer function is undone.

Bytes: T S_h S_w 3 written, and about 1.5 T L_h L_w read.

Legend: T frames, H x W luma samples, h x w chroma samples, S_h x S_w pixels of the result.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common import extension

_WEIGHT_BITS = 11
_SAMPLE_BITS = 15
_COLOUR_BITS = 13
_COLOUR_SHIFT = _SAMPLE_BITS - 8 + _COLOUR_BITS
MIN_DEPTH, MAX_DEPTH = 8, 14
# kMaxSide of csrc/clip_pixels.h, where places are 32-bit integers.
MAX_SIDE = 2**15


class Chroma(NamedTuple):
    """Where chroma samples lie: luma samples to one of them, and the first one's place in halves of a luma sample."""

    step_y: int
    step_x: int
    site_y: int
    site_x: int


CHROMA_420_LEFT = Chroma(2, 2, 1, 0)
"""4:2:0 of MPEG-2, H.264, HEVC and VP9 unless a stream says otherwise; JPEG and MPEG-1 have (2, 2, 1, 1)."""
CHROMA_444 = Chroma(1, 1, 0, 0)

# Weights of red and blue in luma. BT.601, BT.709, BT.2020, SMPTE 240M, FCC 73.682.
_LUMA_WEIGHTS = {
    "bt601": ("0.299", "0.114"),
    "bt709": ("0.2126", "0.0722"),
    "bt2020": ("0.2627", "0.0593"),
    "smpte240m": ("0.212", "0.087"),
    "fcc": ("0.30", "0.11"),
}
MATRICES = (*_LUMA_WEIGHTS, "rgb", "gray")


@cache
def colour_ints(matrix: str = "bt601", full_range: bool = False, depth: int = 8) -> tuple[int, ...]:
    """The integers by which three components become red, green and blue.

    Args:
        matrix: of MATRICES; `rgb`: the components are red, green and blue; `gray`: the first one is all there is.
        full_range: samples use all values (JPEG), rather than 16 to 235 and 240 times 2**(depth - 8).
        depth: bits of a sample.

    Returns:
        Nine coefficients, row by row, in units of 2**-13, and three offsets with the rounding in them.
    """
    unit = 2 ** (depth - 8)
    full = Fraction(255 * unit, 2**depth - 1)
    black = 0 if full_range or matrix == "rgb" else 16
    luma = full if full_range or matrix == "rgb" else Fraction(255, 219)
    if matrix == "rgb":
        rows = [[luma if i == j else Fraction(0) for j in range(3)] for i in range(3)]
    elif matrix == "gray":
        rows = [[luma, Fraction(0), Fraction(0)]] * 3
    else:
        red, blue = (Fraction(weight) for weight in _LUMA_WEIGHTS[matrix])
        green = 1 - red - blue
        chroma = 2 * (full if full_range else Fraction(255, 224))
        u, v = chroma * (1 - blue), chroma * (1 - red)
        rows = [[luma, Fraction(0), v], [luma, -u * blue / green, -v * red / green], [luma, u, Fraction(0)]]
    ints = [[round(value * 2**_COLOUR_BITS) for value in row] for row in rows]
    middle = 0 if matrix == "rgb" else 128
    fraction = 2 ** (_SAMPLE_BITS - 8)
    offsets = [2 ** (_COLOUR_SHIFT - 1) - fraction * (black * row[0] + middle * (row[1] + row[2])) for row in ints]
    return (*ints[0], *ints[1], *ints[2], *offsets)


def _taps(begin: int, length: int, size: int, flip: bool, step: int, site: int, extent: int) -> tuple[Tensor, Tensor]:
    """First sample and weight of the one behind it, int64 [size] each, along one axis of one component."""
    i = np.arange(size, dtype=np.int64)
    i = size - 1 - i if flip else i
    # Places are in units of 1 / (2 size) of a luma sample, then of 1 / (2 size step) of one's own.
    place = np.clip((2 * i + 1) * length - size, 0, 2 * size * (length - 1)) + 2 * size * begin - site * size
    unit = 2 * size * step
    steps = ((np.clip(place, 0, unit * (extent - 1)) << _WEIGHT_BITS) + unit // 2) // unit
    return torch.from_numpy(steps >> _WEIGHT_BITS), torch.from_numpy(steps & (2**_WEIGHT_BITS - 1))


def _blend(a: Tensor, b: Tensor, weight: Tensor, shift: int) -> Tensor:
    weight = weight.to(a.device, torch.int32)
    return (a * (2**_WEIGHT_BITS - weight) + b * weight + 2 ** (shift - 1)) >> shift


def clip_pixels_ref(
    y: Tensor,
    u: Tensor,
    v: Tensor,
    box: Sequence[int],
    size: Sequence[int],
    flip: bool,
    depth: int,
    chroma: Sequence[int],
    colour: Sequence[int],
) -> Tensor:
    """The numeric definition, in plain PyTorch on any device. Arguments as of the operator, see `clip_pixels`."""
    components = []
    for plane in (y, u, v):
        step_y, step_x, site_y, site_x = CHROMA_444 if plane is y else chroma
        row, row_weight = _taps(box[0], box[2], size[0], False, step_y, site_y, plane.shape[1])
        column, column_weight = _taps(box[1], box[3], size[1], flip, step_x, site_x, plane.shape[2])

        def rows(index: Tensor, plane: Tensor = plane) -> Tensor:
            wide = plane.dtype == torch.uint16
            # Few of PyTorch's operators take uint16.
            found = (plane.view(torch.int16) if wide else plane)[:, index.to(plane.device)].to(torch.int32)
            return (found & 0xFFFF).clamp(max=2**depth - 1) if wide else found

        below = (row + 1).clamp(max=plane.shape[1] - 1)
        down = _blend(rows(row), rows(below), row_weight[:, None], depth + _WEIGHT_BITS - _SAMPLE_BITS)
        right = (column + 1).clamp(max=plane.shape[2] - 1)
        components.append(
            _blend(down[..., column.to(y.device)], down[..., right.to(y.device)], column_weight, _WEIGHT_BITS)
        )
    first, second, third = components
    channels = [
        (colour[3 * c] * first + colour[3 * c + 1] * second + colour[3 * c + 2] * third + colour[9 + c])
        >> _COLOUR_SHIFT
        for c in range(3)
    ]
    return torch.stack(channels, dim=-1).clamp(0, 255).to(torch.uint8)


@cache
def _register_fake() -> None:
    @torch.library.register_fake("vjepa_fast::clip_pixels")
    def _(y, u, v, box, size, flip, depth, chroma, colour):  # type: ignore[no-untyped-def]
        return y.new_empty((y.shape[0], *size, 3), dtype=torch.uint8)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def operator(device: torch.device) -> Any | None:
    """torch.ops.vjepa_fast.clip_pixels; None where PyTorch serves: VJEPA_FAST_OPS=ref, or it cannot run (one warning).

    The first question about a GPU waits for it.
    """
    if os.environ.get("VJEPA_FAST_OPS") == "ref":
        return None
    found = extension.load()
    if found.path is None:
        if found.wanted:
            _warn_once(
                f"frames are cropped and resized by PyTorch, to the same clips but slower: {found.reason}. "
                "Install again with a C++ compiler, or set VJEPA_FAST_OPS=ref to choose PyTorch without this "
                "warning"
            )
        return None
    _register_fake()
    if device.type == "cpu" or (device.type == "cuda" and _runs_on_gpu(device)):
        return torch.ops.vjepa_fast.clip_pixels
    return None


@cache
def _runs_on_gpu(device: torch.device) -> bool:
    """Make one pixel: the GPU may be older than the kernels, the driver older than their runtime."""
    if not extension.load().cuda_architectures:
        return False
    y = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    arguments = ((0, 0, 8, 8), (5, 4), True, 8, CHROMA_444, colour_ints())
    try:
        made = torch.ops.vjepa_fast.clip_pixels(*(y.to(device) for _ in range(3)), *arguments)
        right, problem = torch.equal(made.cpu(), clip_pixels_ref(y, y, y, *arguments)), "it gives wrong pixels"
    except RuntimeError as error:
        right, problem = False, str(error).splitlines()[0]
    if not right:
        _warn_once(f"the CUDA kernel clip_pixels of vjepa-fast cannot be used on {device}, PyTorch serves: {problem}")
    return right


def clip_pixels(
    y: Tensor,
    u: Tensor,
    v: Tensor,
    box: Sequence[int],
    size: Sequence[int],
    *,
    flip: bool = False,
    depth: int = 8,
    chroma: Chroma = CHROMA_420_LEFT,
    colour: Sequence[int] | None = None,
) -> Tensor:
    """Crop, resize, flip and convert the frames of a clip.

    Any strides will do: the chroma plane of NV12 is u = plane[..., 0] and v = plane[..., 1], RGB pixels are three views
    likewise (with CHROMA_444 and the matrix `rgb`), and a gray frame passes its only plane three times.

    Args:
        y: uint8 [T, H, W], or uint16 if depth > 8 (in the host's byte order, samples in the low bits); sides to 2**15.
        u, v: likewise [T, h, w].
        box: top, left, height, width of what is cut out, in luma samples.
        size: height and width of the result, to 2**15.
        flip: mirror left to right.
        depth: bits of a sample, 8 to 14; larger samples count as the largest.
        chroma: where chroma samples lie.
        colour: from colour_ints; None: BT.601, limited range.

    Returns:
        uint8 [T, size[0], size[1], 3], contiguous, on the device of y.

    Raises:
        ValueError: a box that does not lie in the frame, sizes or dtypes that do not fit.
    """
    colour = colour_ints(depth=depth) if colour is None else colour
    arguments = (list(box), list(size), flip, depth, list(chroma), list(colour))
    _check(y, u, v, box, size, depth)
    made_by = operator(y.device) or clip_pixels_ref
    return made_by(y, u, v, *arguments)


def _check(y: Tensor, u: Tensor, v: Tensor, box: Sequence[int], size: Sequence[int], depth: int) -> None:
    """What users get wrong; the operator checks the rest."""
    if y.ndim != 3 or u.shape != v.shape or u.ndim != 3 or len(u) != len(y):
        raise ValueError(
            f"y, u and v have shapes {tuple(y.shape)}, {tuple(u.shape)} and {tuple(v.shape)}; expected "
            "[T, H, W] and twice [T, h, w]"
        )
    sides = max(*y.shape[1:], *u.shape[1:])
    if sides > MAX_SIDE:
        raise ValueError(f"y, u and v have a side of {sides}; expected {MAX_SIDE} at most. Cut the box out first")
    if not MIN_DEPTH <= depth <= MAX_DEPTH:
        raise ValueError(f"depth is {depth}; expected {MIN_DEPTH} to {MAX_DEPTH}")
    dtype = torch.uint8 if depth == 8 and y.dtype != torch.uint16 else torch.uint16
    if not y.dtype == u.dtype == v.dtype == dtype:
        raise ValueError(f"y, u and v have dtypes {y.dtype}, {u.dtype} and {v.dtype}; expected {dtype} of {depth} bits")
    top, left, height, width = box
    if not (0 <= top < top + height <= y.shape[1] and 0 <= left < left + width <= y.shape[2]):
        raise ValueError(
            f"box is {tuple(box)}; expected (top, left, height, width) within a frame of {y.shape[1]} x {y.shape[2]}"
        )
    if len(size) != 2 or not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"size is {tuple(size)}; expected height and width of 1 to {MAX_SIDE}")
