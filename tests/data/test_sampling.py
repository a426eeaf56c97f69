"""What is drawn is in range, complete, and depends on nothing but seed and sample number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vjepa_fast.data import sampling

SEEDS = st.integers(0, 2**64 - 1)


@given(st.one_of(st.integers(1, 50), st.integers(1900, 9000)), SEEDS, st.integers(0, 2**32 - 1))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(sampling.permute(np.arange(size), size, seed, epoch)), np.arange(size))


def test_permutation_is_random_access_and_uniform() -> None:
    epochs = np.arange(3000)
    first, second = (sampling.permute(np.full(3000, position), 5, 1, epochs) for position in (0, 1))
    assert sampling.permute(np.array([1]), 5, 1, 77)[0] == second[77]
    # Every pair of (first, second) element is as frequent as the others: 20 pairs, 150 expected, 12 standard error.
    pairs = np.bincount(first * 5 + second, minlength=25).reshape(5, 5)
    assert np.all(np.diag(pairs) == 0)
    off = pairs[~np.eye(5, dtype=bool)]
    assert off.min() > 150 - 4 * 12 and off.max() < 150 + 4 * 12
    # The large case: where 0 and 1 go, over eighths of the range. 60 expected, 7.7 standard error.
    size, epochs = 5000, np.arange(3840)
    first, second = (sampling.permute(np.full(3840, position), size, 1, epochs) * 8 // size for position in (0, 1))
    pairs = np.bincount(first * 8 + second, minlength=64)
    assert pairs.min() > 60 - 5 * 7.7 and pairs.max() < 60 + 5 * 7.7


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), SEEDS, st.integers(0, 10**9), st.booleans())
def test_every_video_once_an_epoch(sizes: list[int], seed: int, epoch: int, shuffle: bool) -> None:
    total = sum(sizes)
    samples = epoch * total + np.arange(total)
    dataset, video = sampling.choose_videos(samples, sizes, None, seed, shuffle)
    assert len(set(zip(dataset.tolist(), video.tolist(), strict=True))) == total
    assert all(0 <= v < sizes[d] for d, v in zip(dataset, video, strict=True))
    if not shuffle:
        assert np.array_equal(np.cumsum([0, *sizes])[dataset] + video, np.arange(total))


def test_epochs_and_seeds_differ() -> None:
    samples = np.arange(300)
    _, video = sampling.choose_videos(samples, [100], None, 0)
    assert len({tuple(video[start : start + 100]) for start in (0, 100, 200)}) == 3
    assert not np.array_equal(video, sampling.choose_videos(samples, [100], None, 1)[1])


@given(st.integers(1, 6), st.booleans(), st.integers(0, 10**12))
def test_a_sample_is_the_same_in_any_company(parts: int, weighted: bool, first: int) -> None:
    """Neither the number of processes nor the batch enters."""
    sizes, weights = [13, 1, 30], [0.2, 0.0, 3.0] if weighted else None
    samples = first + np.arange(60)
    whole = np.stack(sampling.choose_videos(samples, sizes, weights, 5))
    for part in range(parts):
        own = np.stack(sampling.choose_videos(samples[part::parts], sizes, weights, 5))
        assert np.array_equal(own, whole[:, part::parts])


def test_weights_are_shares_of_the_clips() -> None:
    dataset, video = sampling.choose_videos(np.arange(20000), [3, 7, 5], [1.0, 0.0, 3.0], 0)
    assert abs(np.mean(dataset == 2) - 0.75) < 0.02 and not np.any(dataset == 1)
    assert np.abs(np.bincount(video[dataset == 2]) / np.sum(dataset == 2) - 0.2).max() < 0.02


@given(st.integers(0, 2**50), st.integers(1, 300), SEEDS, st.data())
def test_replacements_are_other_videos_without_repetition(
    sample: int, size: int, seed: int, data: st.DataObject
) -> None:
    video = data.draw(st.integers(0, size - 1))
    others = list(sampling.replacements(sample, video, size, seed))
    assert len(others) == len(set(others)) == min(size - 1, sampling.MAX_REPLACEMENTS)
    assert video not in others and all(0 <= other < size for other in others)


def test_replacements_differ_between_samples() -> None:
    assert len({next(sampling.replacements(sample, 0, 1000, 0)) for sample in range(50)}) > 40


@given(st.integers(0, 2**50), st.integers(1, 2000), st.integers(1, 64), st.integers(1, 40), SEEDS)
def test_frames_are_in_range_and_ordered(sample: int, num_frames: int, length: int, step: int, seed: int) -> None:
    numbers = sampling.clip_frames(sample, 3, num_frames, length, step, seed)
    assert numbers.shape == (length,) and numbers.dtype == np.int64
    assert numbers[0] >= 0 and numbers[-1] < num_frames
    assert np.all(np.diff(numbers) >= 0)
    if num_frames > length * step:
        assert numbers[-1] - numbers[0] == (length * step - 1 if length > 1 else 0)


def test_frames_follow_the_rule() -> None:
    """112 frames of a 30 fps video at 4 fps: spacing 112/15, the last clipped."""
    starts = set()
    for sample in range(200):
        numbers = sampling.clip_frames(sample, 0, 116, 16, 7, 0)
        start = int(numbers[0])
        starts.add(start)
        assert (numbers - start).tolist() == [int(i * 112 / 15) for i in range(15)] + [111]
    assert starts == {0, 1, 2, 3, 4}
    # No longer than the clip: 50 // 7 = 7 frames over the whole, then the last one again.
    short = [0, 8, 16, 25, 33, 41] + [49] * 10
    assert sampling.clip_frames(0, 0, 50, 16, 7, 0).tolist() == short
    assert sampling.clip_frames(0, 0, 3, 4, 7, 0).tolist() == [2] * 4


def test_step() -> None:
    assert sampling.clip_step(30000 / 1001, 16, fps=4) == 7
    assert sampling.clip_step(24.0, 16, fps=5.0) == 4
    assert sampling.clip_step(3.0, 16, fps=4) == 1
    assert sampling.clip_step(25.0, 16, duration=2.0) == 3
    assert sampling.clip_step(25.0, 64, duration=1.0) == 1
    assert sampling.clip_step(0.0, 16, frame_step=4) == 4
    with pytest.raises(ValueError, match="frame rate is unknown"):
        sampling.clip_step(0.0, 16, fps=4)


@given(st.integers(0, 2**50), st.integers(1, 800), st.integers(1, 800), SEEDS)
def test_crop_is_inside_and_as_large_as_asked(sample: int, height: int, width: int, seed: int) -> None:
    top, left, box_height, box_width = sampling.crop_box(sample, 1, height, width, (0.3, 1.0), (0.75, 1.35), seed)
    assert top >= 0 and top + box_height <= height and left >= 0 and left + box_width <= width
    assert box_height >= 1 and box_width >= 1
    if height > 50 and width > 50 and 0.75 < width / height < 1.35:
        assert 0.28 < box_height * box_width / (height * width) <= 1
        assert 0.72 < box_width / box_height < 1.4


def test_crop_falls_back_to_the_centre() -> None:
    assert sampling.crop_box(0, 0, 10, 1000, (0.9, 1.0), (0.75, 1.5), 0) == (0, 492, 10, 15)
    assert sampling.crop_box(0, 0, 1000, 12, (0.9, 1.0), (0.75, 1.5), 0) == (492, 0, 16, 12)


def test_crop_and_flip_are_spread_as_they_should() -> None:
    # Areas small enough that no shape has to be drawn again.
    boxes = np.array([sampling.crop_box(s, 0, 300, 400, (0.3, 0.5), (0.75, 1.35), 0) for s in range(600)])
    assert abs(np.mean(np.log(boxes[:, 3] / boxes[:, 2])) - (math.log(0.75) + math.log(1.35)) / 2) < 0.03
    assert abs(np.mean(boxes[:, 2] * boxes[:, 3]) / 120000 - 0.4) < 0.01
    assert boxes[:, 0].min() < 3 and boxes[:, 1].max() > 180
    assert abs(np.mean([sampling.is_flipped(s, 0, 0) for s in range(600)]) - 0.5) < 0.06
