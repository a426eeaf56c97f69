"""JPEG files through DALI on the CPU: the bits of Pillow, and files that are damaged."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import picture
from tests.data.decode.dali_cases import CPU, jpegs, needs_dali, run
from vjepa_fast.data.decode.dali import DaliPreparer
from vjepa_fast.data.decode.dali_pipelines import DaliFinisher
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.jpeg import decode_jpeg_clip
from vjepa_fast.data.decode.request import ClipRequest, JpegSource
from vjepa_fast.data.sampling import Box


@dataclass(frozen=True)
class Frames:
    """A video of JPEG files."""

    files: list[bytes]
    path: str = "frames"
    avg_fps: float = 4.0
    width: int = 64
    height: int = 48
    is_image: bool = False

    @property
    def num_frames(self) -> int:
        return len(self.files)

    def read_jpegs(self, frame_numbers: np.ndarray) -> list[bytes]:
        return [self.files[number] for number in frame_numbers]


@needs_dali
def test_jpeg_frames_equal_pillow_to_the_bit() -> None:
    source = Frames(list(jpegs(9)))
    assert isinstance(source, JpegSource)
    whole = Box(0, 0, 48, 64)
    wanted = [np.array([0, 2, 4, 8]), np.array([5, 5, 6, 1])]
    for numbers in (wanted, wanted[:1]):
        clips = run([ClipRequest(source, one, whole, (48, 64), False) for one in numbers])
        for clip, one in zip(clips, numbers, strict=True):
            expected = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in source.read_jpegs(one)])
            assert np.array_equal(clip.numpy(), expected)
    flipped = run([ClipRequest(source, wanted[0], whole, (48, 64), True)])
    assert torch.equal(flipped, run([ClipRequest(source, wanted[0], whole, (48, 64), False)]).flip(3))
    cut = Frames([file[:-20] for file in source.files])
    with pytest.raises(DecodeError, match="no whole JPEG"):
        DaliPreparer(on_gpu=False).prepare(ClipRequest(cut, wanted[0], whole, (48, 64), False))


@needs_dali
@pytest.mark.parametrize(
    "height, width, options",
    [
        (48, 64, {"subsampling": "4:2:0"}),
        (75, 101, {"subsampling": "4:2:0", "progressive": True}),
        (75, 101, {"subsampling": "4:2:2"}),
        (50, 40, {"subsampling": "4:4:4"}),
    ],
)
def test_clips_of_jpeg_frames_equal_pillow_to_the_bit(height: int, width: int, options: dict[str, Any]) -> None:
    """DALI decodes the blocks around a crop alone; they must be what a decoded frame has there."""
    files = []
    for number in range(4):
        file = io.BytesIO()
        Image.fromarray(picture(number, height, width)).save(file, "jpeg", quality=90, **options)
        files.append(file.getvalue())
    source, rng = Frames(files, height=height, width=width), np.random.default_rng(0)
    requests = []
    for number in range(16):
        top, left = int(rng.integers(height - 8)), int(rng.integers(width - 8))
        box = Box(top, left, int(rng.integers(8, height - top + 1)), int(rng.integers(8, width - left + 1)))
        requests.append(ClipRequest(source, rng.integers(0, 4, 3), box, (32, 40), number % 2 == 1))
    for clip, request in zip(run(requests), requests, strict=True):
        assert torch.equal(clip, decode_jpeg_clip(request))


@needs_dali
def test_damaged_jpeg_costs_itself_alone_and_has_a_reason() -> None:
    whole = next(jpegs(1))
    tables = whole.index(b"\xff\xc4") + 5
    files = [whole, whole[:tables] + b"\xff" * 16 + whole[tables + 16 :], whole]
    box, numbers = Box(0, 0, 48, 64), np.zeros(2, dtype=np.int64)
    preparer, finisher = DaliPreparer(on_gpu=False), DaliFinisher(CPU, (48, 64), 3, 1, 1, False)
    requests = [ClipRequest(Frames([file]), numbers, box, (48, 64), False) for file in files]
    finished = finisher.wait(finisher.start(preparer.collate([preparer.prepare(request) for request in requests])))
    assert finished.failed == [(1, "DALI cannot decode it: Failed to decode sample #0")]
    assert torch.equal(finished.clips[0], decode_jpeg_clip(requests[0]))
    assert torch.equal(finished.clips[2], finished.clips[0])
