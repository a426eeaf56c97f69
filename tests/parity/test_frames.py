"""Frame numbers: ours against the reference's loader, on 1,000 pairs of video and clip.

Three differences are intended (vjepa_fast.data.sampling): where the reference gives up because a video is slower than
the target rate, every frame is taken; the last window can be drawn; and the window comes from another generator, so the
reference's is put in its place here.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from vjepa_fast.data import sampling

from . import golden_format, reference_v2
from .frame_cases import FrameCase, FrameResult, frame_cases, frames_hash


def our_numbers(case: FrameCase, start: int | None) -> np.ndarray:
    step = sampling.clip_step(case.avg_fps, case.fpc, **case.settings)
    bounds = []

    def below(word: np.ndarray, bound: int) -> np.ndarray:
        bounds.append(bound)
        return np.int64(start)

    with mock.patch.object(sampling, "below", below):
        numbers = sampling.clip_frames(0, 0, case.num_frames, case.fpc, step, 0)
    # One window more than the reference draws from, the last.
    assert bounds == ([] if start is None else [case.num_frames - case.fpc * step + 1])
    return numbers


def slow(case: FrameCase) -> bool:
    return (
        case.rule == "fps"
        and np.ceil(case.avg_fps) < case.value
        or (case.rule == "duration" and int(case.value * np.ceil(case.avg_fps) / case.fpc) == 0)
    )


def compare(case: FrameCase, theirs: FrameResult, same: bool) -> None:
    if theirs.numbers is None:
        assert slow(case)
        assert sampling.clip_step(case.avg_fps, case.fpc, **case.settings) == 1
    else:
        assert not slow(case) and same, case


def test_numbers_are_those_that_the_reference_gave() -> None:
    golden = golden_format.read("frames")
    kinds = {-2: 0, -1: 0, 0: 0}
    for case, start, crc in zip(frame_cases(), golden["starts"], golden["crc32_of_numbers"], strict=True):
        kinds[min(start, 0)] += 1
        found = None if start == -2 else our_numbers(case, None if start == -1 else start)
        compare(case, FrameResult(start, found), found is not None and frames_hash(found) == crc)
    assert sum(kinds.values()) == 1000 and min(kinds.values()) > 50


@reference_v2.needs_reference
def test_numbers_are_those_of_the_reference() -> None:
    for seed, case in enumerate(frame_cases()):
        theirs = reference_v2.frame_numbers(case, seed)
        same = theirs.numbers is not None and np.array_equal(our_numbers(case, theirs.start), theirs.numbers)
        compare(case, theirs, same)


@reference_v2.needs_reference
@pytest.mark.parametrize("num_frames", [33, 40])
def test_reference_never_draws_the_last_window(num_frames: int) -> None:
    case = FrameCase(num_frames, 30.0, 8, "frame_step", 4)
    theirs = {reference_v2.frame_numbers(case, seed).start for seed in range(200)}
    ours = {int(sampling.clip_frames(sample, 0, num_frames, 8, 4, 0)[0]) for sample in range(200)}
    assert theirs == set(range(num_frames - 32)) and ours == theirs | {num_frames - 32}
