"""Which frames a pack holds, and their size."""

from __future__ import annotations

import numpy as np

from vjepa_fast.data.pack.encode import packed_frames, packed_size
from vjepa_fast.data.pack.index import PackSettings


def test_frames_and_sizes() -> None:
    numbers, fps, phases = packed_frames(100, 30.0, PackSettings())
    assert numbers[:6].tolist() == [0, 7, 15, 22, 30, 37] and (fps, phases) == (4.0, 1)
    numbers, fps, phases = packed_frames(100, 30.0, PackSettings(two_phase=True))
    assert numbers[:6].tolist() == [0, 4, 7, 11, 15, 19] and (fps, phases) == (4.0, 2)
    # Never a frame twice: slow videos keep what they have.
    for rate in (3.0, 4.0, 6.5, 7.99, 8.0, 8.01, 23.976):
        for two in (False, True):
            numbers, fps, phases = packed_frames(57, rate, PackSettings(two_phase=two))
            assert (np.diff(numbers) > 0).all() and numbers[0] == 0 and numbers[-1] <= 56
            # No frame is missing at the end.
            assert numbers[-1] + rate / (fps * phases) > 55.5
            assert (fps, phases) == (min(rate, 4.0), 2 if two and rate >= 8 else 1)
    # Three frames at 24 a second are one at 8: too few for two phases.
    for num_frames, kept, phases in ((3, [0], 1), (4, [0, 3], 2), (1, [0], 1)):
        numbers, _, found = packed_frames(num_frames, 24.0, PackSettings(two_phase=True))
        assert (numbers.tolist(), found) == (kept, phases)
    assert packed_size(360, 640, 256) == (256, 448) and packed_size(1920, 1080, 256) == (448, 256)
    assert packed_size(240, 320, 256) == (224, 320) and packed_size(30, 640, 256) == (30, 640)
    assert packed_size(256, 256, 320) == (256, 256) and packed_size(480, 640, 256) == (256, 352)
