"""Our attentive probes against the reference's: forward pass and three training steps with its optimizer settings.

With checkouts the comparison itself; without, against the numbers its own code gave (golden/probe_*.json).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vjepa_fast.data.sampling import clip_step
from vjepa_fast.evaluation.views import ClipRule, segment_frames

from . import golden_format, probe_ours, probe_reference
from .cases import relative_difference
from .frame_cases import frame_cases
from .probe_cases import PROBE_CASES, ProbeCase, known
from .reference_v2 import needs_reference, segment_frame_numbers
from .test_golden import assert_summary

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel:FutureWarning")
EVERY_CASE = pytest.mark.parametrize("case", PROBE_CASES.values(), ids=PROBE_CASES.keys())


@EVERY_CASE
def test_golden_fp64(case: ProbeCase) -> None:
    run, golden = probe_ours.run(case, probe_ours.weights(case), torch.float64), golden_format.read(case.name)
    for (loss, outputs, gradients, lr, decay), expected in zip(run.steps, golden["steps"], strict=True):
        assert loss == pytest.approx(expected["loss"], rel=1e-6 if outputs.dtype == torch.float32 else 1e-10)
        assert lr == pytest.approx(expected["lr"], rel=1e-12)
        assert decay == pytest.approx(expected["weight_decay"], rel=1e-12)
        assert gradients.keys() == expected["gradients"].keys()
        for name, numbers in expected["gradients"].items():
            assert_summary(name, known(name, gradients[name]), numbers, 1e-9)
    assert run.weights.keys() == golden["weights"].keys()
    for name, numbers in golden["weights"].items():
        assert_summary(name, known(name, run.weights[name]), numbers, 1e-9)


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_beside_the_reference(case: ProbeCase, dtype: torch.dtype) -> None:
    probe_reference.skip_without(case)
    start = probe_ours.weights(case)
    theirs, mine = probe_reference.run(case, start, dtype), probe_ours.run(case, start, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for reference, step in zip(theirs.steps, mine.steps, strict=True):
        assert step[0] == pytest.approx(reference[0], rel=tolerance)
        assert relative_difference(step[1], reference[1]) <= tolerance
        assert step[2].keys() == reference[2].keys()
        for name, expected in reference[2].items():
            assert relative_difference(known(name, step[2][name]), known(name, expected)) <= tolerance, name
        assert step[3:] == pytest.approx(reference[3:], rel=1e-12)
    assert mine.weights.keys() == theirs.weights.keys()
    for name, expected in theirs.weights.items():
        assert relative_difference(known(name, mine.weights[name]), known(name, expected)) <= tolerance, name


@needs_reference
@pytest.mark.parametrize("segments", [1, 2, 3, 8])
def test_frames_of_segments(segments: int) -> None:
    """Where parts are longer than a clip; shorter ones are spaced in another way on purpose."""
    places = [0.0, 0.5, 1.0, 0.3, 0.7, 0.2, 0.9, 0.1][:segments]
    compared = 0
    for case in frame_cases():
        if case.rule == "duration":
            continue
        rule = ClipRule(
            case.fpc,
            case.value if case.rule == "fps" else None,
            int(case.value) if case.rule == "frame_step" else None,
            (8, 8),
            segments,
        )
        source: Any = SimpleNamespace(num_frames=case.num_frames, avg_fps=case.avg_fps, is_image=False)
        step = clip_step(case.avg_fps, case.fpc, fps=rule.fps, frame_step=rule.frame_step)
        if case.num_frames // segments <= case.fpc * step or case.avg_fps < (rule.fps or 0):
            continue
        expected = segment_frame_numbers(case, segments, places)
        found = segment_frames(source, rule, places)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True)), case
        compared += 1
    assert compared > 10


@EVERY_CASE
def test_start_of_training(case: ProbeCase) -> None:
    """The reference's initialisation: the same spread of every weight."""
    probe_reference.skip_without(case)
    from vjepa_fast.evaluation.head_grid import HeadGrid

    torch.manual_seed(0)
    theirs = probe_reference.build(case, torch.float32).state_dict()
    grid = HeadGrid.start(2, case.dim, case.num_heads, case.num_classes, case.depth, seed=0)
    for name, value in grid.parameters.items():
        spread, expected = value.detach().std().item(), theirs[name].std().item()
        assert spread == pytest.approx(expected, rel=0.5 if value[0].numel() < 100 else 0.1), name
    assert not torch.equal(grid.parameters["linear.weight"][0], grid.parameters["linear.weight"][1])
