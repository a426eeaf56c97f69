"""Frames of every kind become the clip that their colours say."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange
from PIL import Image

from tests.data.conftest import picture
from vjepa_fast.data.decode.convert import ToPixels, ToRgb, rgb_pixels
from vjepa_fast.data.decode.index import DecodeError, VideoIndex
from vjepa_fast.data.decode.pyav import decode_clip
from vjepa_fast.data.decode.request import ClipRequest, open_source
from vjepa_fast.data.sampling import Box
from vjepa_fast.ops.clip_pixels import CHROMA_444, clip_pixels, colour_ints

NONE = np.zeros(0, dtype=np.int64)
WHOLE = Box(0, 0, 48, 64)


def index(codec: str = "h264", height: int = 48, width: int = 64) -> VideoIndex:
    return VideoIndex(1, 24.0, width, height, NONE, NONE, NONE, NONE.astype(bool), codec)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture without edges, on which interpolation of chroma matters little."""
    y, x = np.mgrid[:height, :width]
    return np.stack([60 + 2 * x, 40 + 3 * y, 200 - x - y], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "name",
    [
        "yuv420p",
        "yuv422p",
        "yuv444p",
        "yuv440p",
        "yuv411p",
        "yuv410p",
        "yuvj420p",
        "yuvj444p",
        "nv12",
        "yuv420p10le",
        "yuv422p10le",
        "yuv444p10le",
        "yuv420p9le",
        "yuv420p12le",
        "yuv444p14le",
        "yuv444p16le",
        "yuva420p",
        "gbrp",
        "gbrp10le",
        "rgb24",
        "bgra",
        "yuyv422",
        "p010le",
    ],
)
def test_every_format_gives_back_the_picture(name: str) -> None:
    """Within what FFmpeg loses in making the frame."""
    rgb = smooth()
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=name)
    found = ToPixels(index(), WHOLE, (48, 64), flip=False)(frame)
    assert found.shape == (1, 48, 64, 3) and found.dtype == torch.uint8
    # Chroma of four pixels is the last word on what lies between them.
    error = np.abs(found[0].numpy().astype(int) - rgb)[6:-6, 6:-6]
    assert error.max() <= (9 if "41" in name else 6) and error.mean() < 2.5


def test_gray_and_palettes() -> None:
    values = smooth()[..., 0]
    gray = av.VideoFrame.from_ndarray(values, format="gray")
    assert np.array_equal(ToPixels(index(), WHOLE, (48, 64), False)(gray)[0, ..., 1].numpy(), values)
    limited = av.VideoFrame.from_ndarray(values, format="gray")
    limited.color_range = ColorRange.MPEG
    stretched = np.clip(np.round((values.astype(float) - 16) * 255 / 219), 0, 255)
    assert np.abs(ToPixels(index(), WHOLE, (48, 64), False)(limited)[0, ..., 2].numpy() - stretched).max() <= 1
    palette = np.zeros((256, 4), dtype=np.uint8)
    palette[:, 0], palette[:, 1] = 255, np.arange(256)
    indexed = av.VideoFrame.from_ndarray((values, palette), format="pal8")
    assert np.array_equal(ToPixels(index(), WHOLE, (48, 64), False)(indexed), ToRgb(index(), None)(indexed)[None])


@pytest.mark.parametrize(
    ("space", "red"),
    [(1, 255), (2, 232), (5, 232), (6, 232), (9, 241)],
    ids=["bt709", "none", "bt470bg", "smpte170m", "bt2020"],
)
def test_the_matrix_is_that_of_the_tag(space: int, red: int) -> None:
    """Red of BT.709, read as what the tag says; without a tag it is read as BT.601."""
    frame = av.VideoFrame(64, 48, "yuv420p")
    for plane, value in zip(frame.planes, (63, 102, 240), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace = space
    found = ToPixels(index(), WHOLE, (8, 8), False)(frame)
    assert abs(int(found[0, 0, 0, 0]) - red) <= 2


def test_chroma_lies_left_but_in_jpeg() -> None:
    frame = av.VideoFrame.from_ndarray(picture(0, 48, 64), format="rgb24").reformat(format="yuvj420p")
    left, centre = (ToPixels(index(codec), WHOLE, (32, 32), False)(frame).int() for codec in ("h264", "mjpeg"))
    assert 0 < (left - centre).abs().float().mean() < 12


def test_difference_from_ffmpegs_conversion() -> None:
    """FFmpeg repeats chroma and cuts fractions off: it is a little darker."""
    frame = av.VideoFrame.from_ndarray(smooth(), format="rgb24").reformat(format="yuv420p")
    ours = ToPixels(index(), WHOLE, (48, 64), False)(frame)[0].numpy().astype(int)
    difference = ours - ToRgb(index(), None)(frame)
    assert np.abs(difference).mean() < 2.5 and -0.5 < difference.mean() < 2


def test_frames_of_another_size_take_that_of_the_index() -> None:
    frame = av.VideoFrame.from_ndarray(smooth(24, 32), format="rgb24").reformat(format="yuv420p")
    found = ToPixels(index(), WHOLE, (48, 64), False)(frame)
    assert np.array_equal(found[0].numpy(), ToRgb(index(), None)(frame))


@pytest.mark.parametrize(("height", "width"), [(47, 61), (1, 1), (2, 3), (33, 64)])
@pytest.mark.parametrize("name", ["yuv420p", "nv12", "yuv420p10le"])
def test_odd_sizes_and_boxes_at_the_edges(name: str, height: int, width: int) -> None:
    frame = av.VideoFrame(width, height, name)
    for plane in frame.planes:
        # Padding must not be seen: 255 there, gray in the picture.
        plane.update(b"\xff" * plane.buffer_size)
    for number, plane in enumerate(frame.planes):
        wide = name.endswith("le")
        samples = np.frombuffer(plane, np.uint16 if wide else np.uint8).reshape(plane.height, -1)
        per_line = -(-width // 2) * (2 if name == "nv12" else 1) if number else width
        samples[:, :per_line] = 512 if wide else 128
    for box in (Box(0, 0, height, width), Box(height - 1, width - 1, 1, 1)):
        found = ToPixels(index(height=height, width=width), box, (9, 7), True)(frame)
        assert (found == 130).all()


def test_sides_that_the_operator_does_not_take(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 40_000, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "wide.png")
    source = open_source(str(tmp_path / "wide.png"))
    box = Box(1, 33_000, 6, 5_000)
    cut = rgb[1:7, 33_000:38_000]
    found = decode_clip(ClipRequest(source, np.zeros(2, dtype=np.int64), box, (6, 5_000), False))
    assert np.array_equal(found, np.stack([cut, cut]))
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv444p")
    found = ToPixels(index(height=8, width=40_000), box, (6, 5_000), False)(frame)
    assert np.abs(found[0].numpy().astype(int) - cut).max() <= 4
    with pytest.raises(DecodeError, match=r"39000 x 8\b.*\b32768\b"):
        decode_clip(ClipRequest(source, np.zeros(1, dtype=np.int64), Box(0, 0, 8, 39_000), (8, 8), False))


def test_what_is_cut_first_is_equal_to_the_bit() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)
    for box, size in ((Box(3, 5, 30, 50), (16, 24)), (Box(0, 40, 41, 27), (57, 31)), (Box(40, 66, 1, 1), (4, 4))):
        found = rgb_pixels(rgb, box, size, flip=True)
        whole = clip_pixels(
            *torch.from_numpy(rgb)[None].unbind(-1), box, size, flip=True, chroma=CHROMA_444, colour=colour_ints("rgb")
        )
        assert torch.equal(found, whole)
