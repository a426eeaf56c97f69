"""Cases of the pixel operator, and its CUDA kernel run on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from vjepa_fast.ops.clip_pixels import MATRICES, clip_pixels_ref, colour_ints

LAYOUTS = ("planar", "nv12", "strided", "expanded")


@dataclass(frozen=True)
class Case:
    frame: tuple[int, int, int]
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False
    depth: int = 8
    chroma: tuple[int, int, int, int] = (2, 2, 1, 0)
    matrix: str = "bt601"
    full_range: bool = False
    layout: str = "planar"
    seed: int = 0
    spare_bits: bool = False
    """Samples may be larger than their depth allows."""

    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng(self.seed)
        num_frames, height, width = self.frame
        top = 2 ** (16 if self.depth > 8 and self.spare_bits else self.depth)
        dtype = np.uint8 if self.depth == 8 else np.uint16

        def make(*shape: int) -> Tensor:
            # Half of the samples at the ends of the range, where rounding and clamping happen.
            values = rng.integers(0, top, shape)
            ends = rng.choice([0, top - 1], shape)
            return torch.from_numpy(np.where(rng.random(shape) < 0.5, values, ends).astype(dtype))

        rows, columns = -(-height // self.chroma[0]), -(-width // self.chroma[1])
        if self.layout == "nv12":
            both = make(num_frames, rows, columns, 2)
            return make(num_frames, height, width), both[..., 0], both[..., 1]
        if self.layout == "strided":
            return (
                make(num_frames, height + 3, width + 5)[:, 2:-1, 3:-2],
                make(columns, num_frames, rows).permute(1, 2, 0),
                make(num_frames, 2 * rows, columns)[:, ::2],
            )
        if self.layout == "expanded":
            return (
                make(1, height, width).expand(num_frames, -1, -1),
                make(num_frames, 1, columns).expand(-1, rows, -1),
                make(num_frames, rows, columns),
            )
        return make(num_frames, height, width), make(num_frames, rows, columns), make(num_frames, rows, columns)

    def arguments(self) -> list[Any]:
        return [
            *self.planes(),
            list(self.box),
            list(self.size),
            self.flip,
            self.depth,
            list(self.chroma),
            list(colour_ints(self.matrix, self.full_range, self.depth)),
        ]

    def reference(self) -> Tensor:
        return clip_pixels_ref(*self.arguments())


@st.composite
def cases(draw: Any) -> Case:
    def integer(low: int, high: int) -> int:
        return int(draw(st.integers(low, high)))

    height, width = integer(1, 70), integer(1, 70)
    box_height, box_width = integer(1, height), integer(1, width)
    box = (integer(0, height - box_height), integer(0, width - box_width), box_height, box_width)
    return Case(
        (integer(0, 9), height, width),
        box,
        (integer(1, 60), integer(1, 60)),
        draw(st.booleans()),
        draw(st.sampled_from([8, 8, 8, 9, 10, 12, 14])),
        (draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4])), integer(0, 3), integer(0, 3)),
        draw(st.sampled_from(MATRICES)),
        draw(st.booleans()),
        draw(st.sampled_from(LAYOUTS)),
        integer(0, 99),
        draw(st.booleans()),
    )


# As in training; one pixel; a size that is no multiple of four; larger than the box; more frames than a thread takes.
EXAMPLES = [
    Case((2, 90, 160), (7, 20, 72, 85), (64, 64), True),
    Case((1, 1, 1), (0, 0, 1, 1), (5, 7)),
    Case((3, 33, 45), (1, 2, 31, 43), (17, 19), layout="nv12"),
    Case((9, 8, 8), (2, 2, 4, 4), (32, 32), layout="strided", depth=10, spare_bits=True),
    Case((0, 8, 8), (0, 0, 8, 8), (4, 4)),
]


def emulate(library: ctypes.CDLL, arguments: list[Any], block: int = 128) -> Tensor:
    """The kernel's threads one after another; bytes behind the clip must stay what they were."""
    y, u, v, box, size, flip, depth, chroma, colour = arguments

    def ints(values: Any) -> Any:
        return (ctypes.c_int64 * len(values))(*(int(value) for value in values))

    planes = (ctypes.c_void_p * 3)(*(plane.data_ptr() for plane in (y, u, v)))
    num_bytes = len(y) * size[0] * size[1] * 3
    out = np.full(num_bytes + 64, 0xA5, dtype=np.uint8)
    library.emulated_pixels(
        planes,
        ints([stride for plane in (y, u, v) for stride in plane.stride()]),
        ints([*y.shape[1:], *u.shape[1:]]),
        ctypes.c_int64(len(y)),
        ints(box),
        ints(size),
        ctypes.c_int64(flip),
        ctypes.c_int64(depth),
        ctypes.c_int64(y.dtype == torch.uint16),
        ints(chroma),
        ints(colour),
        ctypes.c_int64(block),
        ctypes.c_void_p(out.ctypes.data),
    )
    assert (out[num_bytes:] == 0xA5).all()
    return torch.from_numpy(out[:num_bytes]).view(len(y), *size, 3)
