"""Videos and clips for which the frame numbers of the reference's loader are compared with ours."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import numpy as np

NUM_FRAME_CASES = 1000
_RATES = (3.0, 6.25, 10.0, 12.0, 15.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0)


@dataclass(frozen=True)
class FrameCase:
    """`rule` is fps (frames per second), duration (seconds) or frame_step, and `value` what it is set to."""

    num_frames: int
    avg_fps: float
    fpc: int
    rule: str
    value: int | float

    @property
    def settings(self) -> dict[str, int | float | None]:
        return {"fps": None, "duration": None, "frame_step": None, self.rule: self.value}


@dataclass(frozen=True)
class FrameResult:
    """Where the window was put, None where the clip is no shorter than the video, and its frame numbers.

    `numbers` is None where the reference's loader gives up.
    """

    start: int | None
    numbers: np.ndarray | None


def frame_cases() -> list[FrameCase]:
    """The same in every run; clips longer than their video, and just as long, are among them."""
    rng = random.Random(1000)
    cases = []
    for _ in range(NUM_FRAME_CASES):
        rate, fpc = rng.choice(_RATES), rng.choice((2, 4, 8, 16, 32, 64))
        rule, value = rng.choice(
            [
                ("fps", 4),
                ("fps", rng.choice((1, 2, 4, 8))),
                ("frame_step", rng.randint(1, 9)),
                ("duration", rng.choice((0.5, 1.0, 2.0, 4.0))),
            ]
        )
        length = {"fps": fpc * rate / value, "frame_step": fpc * value, "duration": rate * value}[rule]
        # Around the length of the clip, where the rules meet, and far from it.
        around = rng.choice((length, length * 3, 400))
        cases.append(
            FrameCase(
                max(
                    1,
                    round(around * rng.uniform(0.3, 1.7)) if rng.random() < 0.8 else round(length) + rng.randint(-1, 2),
                ),
                rate,
                fpc,
                rule,
                value,
            )
        )
    return cases


def frames_hash(numbers: np.ndarray) -> int:
    """CRC-32 of little-endian int64."""
    return zlib.crc32(np.asarray(numbers).astype("<i8").tobytes())
