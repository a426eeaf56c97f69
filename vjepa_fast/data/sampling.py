"""Which dataset, video, frames, crop and flip: pure functions of (seed, global sample number).

Global sample number g counts the clips of a whole run over all processes: step s, process r of W with b clips each
holds g in [s*b*W + r*b, s*b*W + (r+1)*b). The epoch is g // (number of videos). Every draw is a Philox word
(vjepa_fast.common.rng) with counter (g, epoch) and the stream of what is drawn, so a clip is the same at any number of
processes and workers and after any restart.

With n clips a video (data.clips_per_video) the n sample numbers from n*u on show video number u of the run: what picks
the video is drawn for u, frames, crop and flip for g. An epoch is then n times as many clips.

Video, without weights: position u % total in a permutation of all videos that is new every epoch. The permutation is a
Feistel network over the smallest power of two that holds `total`, whose round function is Philox, followed by cycle
walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): random access, no memory. Below 2048
videos, where a Feistel network is not uniform, the videos are sorted by one Philox word each.
Video, with weights: the dataset with P = weight / sum of weights, then a video of it uniformly, with replacement.
`shuffle: false` (without weights) keeps the manifest's order.

Frames, for a clip of T frames (reference: src/datasets/video_dataset.py, loadvideo_decord):
    video_fps = ceil(average frames per second);  step = video_fps // fps | int(duration * video_fps / T) | frame_step
    length = T * step;  a window [start, start + length) is drawn;  frames = floor(linspace(start, start + length, T)),
    the last one clipped to the window's last frame. The spacing is therefore length / (T - 1), not `step`.
    A video no longer than `length`: floor(linspace(0, n, n // step)) clipped, then the last frame repeated up to T.

    With data.split_videos clip i of n is taken so from the i-th run of (number of frames) // n frames, and without
    data.round_fps video_fps is not rounded (facebookresearch/jepa, src/datasets/video_dataset.py:174-240).

    Of a two-phase pack, frames 0, 2, 4 ... are one video and frames 1, 3, 5 ... another; a coin picks one.

Crop (reference: src/datasets/utils/video/transforms.py, _get_param_spatial_crop): area uniform in `scale` of the
frame, log of the aspect ratio uniform, position uniform, ten tries, then a centred box. Flip with probability 1/2.

Where this differs from the reference on purpose:
* a video slower than the target fps has step 1 (the reference's step 0 fails an assertion in the worker);
* the last possible window can be drawn (np.random.randint leaves it out);
* a broken video is replaced by one of the same dataset (the reference draws from all of them, which ignores the
  weights and mixes up frames per clip), and the number of tries is bounded (the reference's is not);
* processes draw different augmentations (the reference seeds all of them alike);
* an epoch shows every video exactly once at any number of processes (DistributedSampler pads, drop_last drops).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vjepa_fast.common.rng import Stream, below, pack_tag, random_words, unit

MAX_REPLACEMENTS = 50
_NUM_CROP_TRIES = 10
_NUM_ROUNDS = 6
_MIN_FEISTEL = 2048


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int


def permute(
    position: np.ndarray, size: int, seed: int, epoch: int | np.ndarray, stream: Stream = Stream.VIDEO, group: int = 0
) -> np.ndarray:
    """A random permutation of range(size), evaluated at some positions.

    Args:
        position: int64 [N], each in [0, size).
        size: number of elements.
        seed: key of the permutation.
        epoch: scalar or [N]; one permutation for each value.
        stream, group: further words of the key.

    Returns:
        int64 [N], each in [0, size).
    """
    value = np.array(position, dtype=np.int64)
    epoch = np.broadcast_to(np.asarray(epoch, dtype=np.int64), value.shape)
    if size < _MIN_FEISTEL:
        for one in np.unique(epoch):
            words = random_words(seed, np.arange(size), one, pack_tag(stream, group=group))[..., 0]
            value[epoch == one] = np.argsort(words, kind="stable")[value[epoch == one]]
        return value
    low_bits = (size - 1).bit_length() // 2
    high_bits = (size - 1).bit_length() - low_bits
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    todo = np.arange(len(value))
    while len(todo):
        high, low = value[todo] >> low_bits, value[todo] & low_mask
        for block in range(_NUM_ROUNDS):
            tag = pack_tag(stream, group=group, block=block)
            half, mask = (low, high_mask) if block % 2 == 0 else (high, low_mask)
            noise = random_words(seed, half, epoch[todo], tag)[..., 0].astype(np.int64) & mask
            high, low = (high ^ noise, low) if block % 2 == 0 else (high, low ^ noise)
        value[todo] = high << low_bits | low
        todo = todo[value[todo] >= size]
    return value


def choose_videos(
    samples: np.ndarray,
    sizes: Sequence[int],
    weights: Sequence[float] | None,
    seed: int,
    shuffle: bool = True,
    clips_per_video: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Dataset and video of each global sample number.

    Args:
        samples: int64 [N] global sample numbers.
        sizes: videos per dataset, each > 0.
        weights: one per dataset, or None for every video once an epoch.
        seed: of the run.
        shuffle: False keeps the manifest's order; read only without weights.
        clips_per_video: how many consecutive sample numbers share a video.

    Returns:
        dataset int64 [N] and video int64 [N], the latter counted within its dataset.
    """
    turn = np.asarray(samples, dtype=np.int64) // clips_per_video
    total = int(sum(sizes))
    epoch = turn // total
    if weights is not None:
        edges = np.cumsum(np.asarray(weights, dtype=np.float64))
        draw = unit(random_words(seed, turn, epoch, pack_tag(Stream.DATASET))[..., 0]) * edges[-1]
        dataset = np.searchsorted(edges, draw, side="right")
        word = random_words(seed, turn, epoch, pack_tag(Stream.VIDEO))[..., 0]
        return dataset, below(word, np.asarray(sizes, dtype=np.int64)[dataset])
    position = turn % total
    if shuffle:
        position = permute(position, total, seed, epoch)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    dataset = np.searchsorted(ends, position, side="right")
    return dataset, position - (ends - np.asarray(sizes, dtype=np.int64))[dataset]


def replacements(sample: int, video: int, size: int, seed: int) -> Iterator[int]:
    """Other videos of the same dataset, in the order in which they stand in for a broken one.

    Without repetition, so that a readable video of a small dataset is always found; at most MAX_REPLACEMENTS of them.

    Args:
        sample: global sample number.
        video: the broken one, within its dataset.
        size: videos in the dataset.
        seed: of the run.
    """
    # The sample number is part of the key here: two clips that lose the same video get different substitutes.
    key = int(random_words(seed, sample, 0, pack_tag(Stream.REPLACEMENT))[0])
    first = permute(np.arange(min(size, MAX_REPLACEMENTS + 1)), size, seed, key, Stream.REPLACEMENT, group=1)
    yield from first[first != video][:MAX_REPLACEMENTS].tolist()


def clip_step(
    avg_fps: float,
    num_clip_frames: int,
    *,
    fps: float | None = None,
    duration: float | None = None,
    frame_step: int | None = None,
    round_fps: bool = True,
) -> int:
    """Source frames per clip frame, at least 1. Exactly one of fps, duration (seconds), frame_step is given.

    With `round_fps` the video's rate is rounded up first.

    Raises:
        ValueError: fps or duration is given and the video's rate is not positive.
    """
    if frame_step is not None:
        return frame_step
    if not avg_fps > 0:
        raise ValueError("its frame rate is unknown; data.frame_step does without one")
    video_fps = math.ceil(avg_fps) if round_fps else avg_fps
    if duration is not None:
        return max(1, int(duration * video_fps / num_clip_frames))
    assert fps is not None
    return max(1, int(video_fps // fps))


def clip_frames(sample: int, epoch: int, num_frames: int, num_clip_frames: int, step: int, seed: int) -> np.ndarray:
    """Frame numbers of a clip (formula in the module docstring).

    Args:
        sample, epoch: what the window is drawn for.
        num_frames: of the video, > 0.
        num_clip_frames: T.
        step: from clip_step.
        seed: of the run.

    Returns:
        int64 [T], not decreasing, each in [0, num_frames).
    """
    spare = num_frames - num_clip_frames * step
    start = 0
    if spare > 0:
        start = int(below(random_words(seed, sample, epoch, pack_tag(Stream.FRAMES))[0], spare + 1))
    return window_frames(start, num_frames, num_clip_frames, step)


def window_frames(start: int, num_frames: int, num_clip_frames: int, step: int) -> np.ndarray:
    """Frame numbers of the clip that begins at frame `start` (formula in the module docstring).

    Args:
        start: at most num_frames - num_clip_frames * step, 0 in a video that is shorter than that.
        num_frames: of the video, > 0.
        num_clip_frames: T.
        step: from clip_step.

    Returns:
        int64 [T], not decreasing, each in [0, num_frames).
    """
    length = num_clip_frames * step
    if num_frames > length:
        numbers = np.linspace(start, start + length, num=num_clip_frames)
        return np.clip(numbers, start, start + length - 1).astype(np.int64)
    own = num_frames // step
    numbers = np.concatenate([np.linspace(0, num_frames, num=own), np.full(num_clip_frames - own, num_frames)])
    return np.clip(numbers, 0, num_frames - 1).astype(np.int64)


def choose_phase(sample: int, epoch: int, num_phases: int, seed: int) -> int:
    """Which sequence of a packed video a clip is taken from, in [0, max(1, num_phases))."""
    if num_phases <= 1:
        return 0
    return int(below(random_words(seed, sample, epoch, pack_tag(Stream.FRAMES))[1], num_phases))


def crop_box(
    sample: int, epoch: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], seed: int
) -> Box:
    """Random resized crop of a frame.

    Args:
        sample, epoch: what the box is drawn for.
        height, width: of the frame, pixels.
        scale: lowest and highest area, as a fraction of the frame.
        ratio: lowest and highest width over height.
        seed: of the run.
    """
    tags = np.array([pack_tag(Stream.CROP, attempt=attempt) for attempt in range(_NUM_CROP_TRIES)])
    words = random_words(seed, sample, epoch, tags)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_word, ratio_word, top_word, left_word in words:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * float(unit(area_word)))
        aspect = math.exp(low + (high - low) * float(unit(ratio_word)))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return Box(
                int(below(top_word, height - box_height + 1)),
                int(below(left_word, width - box_width + 1)),
                box_height,
                box_width,
            )
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def is_flipped(sample: int, epoch: int, seed: int) -> bool:
    """Whether a clip is mirrored left to right."""
    return bool(random_words(seed, sample, epoch, pack_tag(Stream.FLIP))[0] >> 31)
