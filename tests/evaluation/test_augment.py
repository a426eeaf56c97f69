"""Augmentations: pure functions of what seeds them, uint8, and as often as they should be."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from vjepa_fast.bench.reference import import_environment
from vjepa_fast.evaluation import augment
from vjepa_fast.evaluation.views import ClipRule, read_views, segment_frames, view_boxes
from vjepa_fast.inference.videos import list_videos


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)


THEIRS = {
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_are_the_references(name: str) -> None:
    """To the bit, at magnitudes around 7 and both signs."""
    if not os.environ.get("VJEPA2_REFERENCE"):
        pytest.skip("VJEPA2_REFERENCE does not name a checkout")
    with import_environment(Path(os.environ["VJEPA2_REFERENCE"]).resolve()):
        import importlib

        theirs = importlib.import_module("src.datasets.utils.video.randaugment")
    assert set(theirs._RAND_INCREASING_TRANSFORMS) == {THEIRS.get(one, one) for one in augment.OPERATIONS}
    picture = Image.fromarray(frames()[0])
    for magnitude in (6.3, 7.0, 7.9):
        for sign, coin in ((1.0, 0.1), (-1.0, 0.9)):
            operation = theirs.AugmentOp(
                THEIRS.get(name, name),
                prob=1.0,
                magnitude=magnitude,
                hparams={"translate_const": 100, "interpolation": Image.BICUBIC},
            )
            with mock.patch.object(random, "random", lambda coin=coin: coin):
                expected = operation([picture])[0]
            found = augment.OPERATIONS[name](magnitude / 10, sign)(picture)
            assert np.array_equal(np.asarray(found), np.asarray(expected)), (magnitude, sign)


def test_rand_augment_treats_frames_alike() -> None:
    clip = np.repeat(frames()[:1], 3, axis=0)
    changed = 0
    for seed in range(20):
        found = augment.rand_augment(clip, draw(seed))
        assert found.dtype == np.uint8 and found.shape == clip.shape
        assert np.array_equal(found[0], found[2])
        assert np.array_equal(found, augment.rand_augment(clip, draw(seed)))
        changed += not np.array_equal(found, clip)
    # Four operations, each left out half the time: one clip in sixteen stays as it is.
    assert changed >= 15


def test_erasing() -> None:
    clip = torch.full((3, 32, 48, 3), 77, dtype=torch.uint8)
    shares = []
    for seed in range(400):
        found = augment.erase(clip, draw(seed))
        gone = (found != 77).any(-1)
        if bool(gone.any()):
            # The same rectangle in every frame, with other noise.
            rows, columns = gone.any(0).any(1).nonzero()[:, 0], gone.any(0).any(0).nonzero()[:, 0]
            area = len(rows) * len(columns)
            assert int(rows[-1] - rows[0]) + 1 == len(rows) and int(gone.all(0).sum()) > 0.9 * area
            assert not torch.equal(found[0], found[1])
            shares.append(area / (32 * 48))
    assert 70 <= len(shares) <= 130
    assert min(shares) < 0.08 and 0.25 < max(shares) < 0.36


def test_crop_is_the_references_interpolation() -> None:
    from vjepa_fast.data.sampling import Box

    found = augment.crop_and_resize(frames(), Box(3, 5, 20, 30), (16, 24))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(frames()).permute(0, 3, 1, 2)[:, :, 3:23, 5:35].float(), (16, 24), mode="bilinear"
    )
    assert found.shape == (2, 16, 24, 3)
    assert float((found.permute(0, 3, 1, 2) - expected).abs().max()) <= 0.5


def source(num_frames: int) -> Any:
    return mock.Mock(num_frames=num_frames, avg_fps=24.0, is_image=False, height=48, width=64)


@pytest.mark.parametrize(
    ("num_frames", "segments", "starts"),
    [(100, 1, [38]), (100, 2, [13, 63]), (100, 3, [4, 37, 70]), (60, 3, [0, 18, 36]), (24, 2, [0, 0])],
)
def test_segments(num_frames: int, segments: int, starts: list[int]) -> None:
    rule = ClipRule(8, 8.0, None, (32, 32), segments)
    found = segment_frames(source(num_frames), rule, [0.5] * segments)
    assert [int(one[0]) for one in found] == starts
    assert all(one.max() < num_frames and len(one) == 8 for one in found)


def test_views() -> None:
    assert view_boxes(240, 320, (224, 224), 3) == [(0, 0, 240, 240), (0, 40, 240, 240), (0, 80, 240, 240)]
    assert view_boxes(320, 240, (224, 224), 2) == [(0, 0, 240, 240), (80, 0, 240, 240)]
    assert view_boxes(256, 256, (224, 224), 1) == [(16, 16, 224, 224)]


def test_versions_differ_and_are_repeatable(videos: Path) -> None:
    listed = list_videos([str(videos)])
    rule = ClipRule(8, 8.0, None, (32, 32), 2, version=0)
    first, again = (read_views(listed.open(0), rule, "a") for _ in range(2))
    assert first.shape == (1, 2, 8, 32, 32, 3) and torch.equal(first, again)
    others = [
        read_views(listed.open(0), ClipRule(8, 8.0, None, (32, 32), 2, version=1), "a"),
        read_views(listed.open(0), ClipRule(8, 8.0, None, (32, 32), 2, version=0, seed=1), "a"),
        read_views(listed.open(0), rule, "b"),
    ]
    assert all(not torch.equal(first, other) for other in others)
