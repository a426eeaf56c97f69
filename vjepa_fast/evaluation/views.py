"""Chooses the clips of a video for frozen evaluation: segments in time, views in space, augmented versions.

Reference: evals/video_classification_frozen of facebookresearch/vjepa2, src/datasets/video_dataset.py (frames) and
evals/video_classification_frozen/utils.py (crops). A video is divided into as many parts as there are segments, and of
each a clip is taken; a video with parts shorter than a clip has clips that overlap. One view is the middle of the
frame, 224/256 of the short side; several are squares of the short side, evenly spread along the long one. An augmented
version has clips at random places of the parts, cropped and changed as vjepa_fast.evaluation.augment says.

Where this differs on purpose: what is not augmented is a clip from the middle of each part, where the reference draws a
place even for validation; and clips that overlap have the spacing of all others (the reference's end with one frame
twice).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.data.decode.backend import HostPreparer
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.request import ClipRequest, Source
from vjepa_fast.data.sampling import Box, clip_step, crop_box, window_frames
from vjepa_fast.evaluation.augment import CROP_RATIO, CROP_SCALE, crop_and_resize, erase, rand_augment
from vjepa_fast.inference.videos import middle_box


@dataclass(frozen=True)
class ClipRule:
    """How a video becomes clips.

    Attributes:
        frames: of a clip.
        fps: frames a second; None where frame_step is given.
        frame_step: source frames a clip frame; None where fps is given.
        size: height and width in pixels.
        segments: clips in time, whose tokens a probe sees together.
        views: crops of each, whose answers are averaged.
        version: number of the augmented version; None is without augmentation.
        seed: of the augmentations.
        layers: blocks whose tokens a probe sees, one after another; None: the last.
    """

    frames: int
    fps: float | None
    frame_step: int | None
    size: tuple[int, int]
    segments: int = 1
    views: int = 1
    version: int | None = None
    seed: int = 0
    layers: tuple[int, ...] | None = None


def read_views(source: Source, rule: ClipRule, name: str) -> Tensor:
    """uint8 [views, segments, T, H, W, 3] of a video; an image is shown throughout.

    Args:
        source: the video.
        rule: how it becomes clips.
        name: of the video, from which its augmentations are drawn.

    Raises:
        DecodeError: it cannot be decoded, or its frame rate is unknown.
    """
    if rule.version is not None:
        return _augmented(source, rule, rule.version, name)[None]
    numbers = segment_frames(source, rule, [0.5] * rule.segments)
    boxes = view_boxes(source.height, source.width, rule.size, rule.views)
    requests = [ClipRequest(source, own, box, rule.size, False) for box in boxes for own in numbers]
    clips = torch.stack(HostPreparer().prepare_together(requests))
    return clips.unflatten(0, (rule.views, rule.segments))


def segment_frames(source: Source, rule: ClipRule, places: Sequence[float]) -> list[np.ndarray]:
    """Frame numbers int64 [T] of each segment.

    Args:
        source: the video.
        rule: how it becomes clips.
        places: of each segment, where in its part its clip lies, 0 (the beginning) to 1 (the end).
    """
    if source.is_image:
        return [np.zeros(rule.frames, dtype=np.int64)] * rule.segments
    try:
        step = clip_step(source.avg_fps, rule.frames, fps=rule.fps, frame_step=rule.frame_step)
    except ValueError as error:
        raise DecodeError("its frame rate is unknown") from error
    length, part = rule.frames * step, source.num_frames // rule.segments
    if part > length or rule.segments == 1:
        spare = max(0, part - length)
        starts = [number * part + round(place * spare) for number, place in enumerate(places)]
    else:
        spare = max(0, source.num_frames - length)
        starts = [number * spare // (rule.segments - 1) for number in range(rule.segments)]
    return [window_frames(start, source.num_frames, rule.frames, step) for start in starts]


def view_boxes(height: int, width: int, size: tuple[int, int], views: int) -> list[Box]:
    """The parts of a frame that are seen (see the module docstring)."""
    if views == 1:
        return [middle_box(height, width, *size)]
    side, spare = min(height, width), max(height, width) - min(height, width)
    starts = [spare * number // (views - 1) for number in range(views)]
    return [Box(start, 0, side, side) if height > width else Box(0, start, side, side) for start in starts]


def _augmented(source: Source, rule: ClipRule, version: int, name: str) -> Tensor:
    """uint8 [segments, T, H, W, 3]."""
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()
    sample = int.from_bytes(digest[:7], "big")
    draw = np.random.Generator(np.random.Philox(key=[rule.seed, sample], counter=[0, 0, 0, version]))
    numbers = segment_frames(source, rule, draw.random(rule.segments).tolist())
    whole = Box(0, 0, source.height, source.width)
    requests = [ClipRequest(source, own, whole, whole[2:], False) for own in numbers]
    clips = []
    for number, frames in enumerate(HostPreparer().prepare_together(requests)):
        box = crop_box(sample, version * rule.segments + number, *whole[2:], CROP_SCALE, CROP_RATIO, rule.seed)
        clips.append(erase(crop_and_resize(rand_augment(frames.numpy(), draw), box, rule.size), draw))
    return torch.stack(clips)
