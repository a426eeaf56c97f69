"""Three training steps of V-JEPA 1's modules beside ours: two clips a video, variance term, clipping, tubes, noise."""

from __future__ import annotations

import pytest
import torch

from . import meta_v1_reference, ours_v1
from .cases import recipe_weights, relative_difference, zero_gradient
from .v1_cases import V1_CASES, V1Case

pytestmark = [meta_v1_reference.needs_v1_reference, pytest.mark.filterwarnings("ignore:.*sdp_kernel:FutureWarning")]

EVERY_CASE = pytest.mark.parametrize("case", V1_CASES.values(), ids=V1_CASES.keys())


def start_weights(case: V1Case) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(value.shape) for name, value in meta_v1_reference.build(case).weights().items()}
    return recipe_weights(shapes, case.seed)


@EVERY_CASE
def test_three_steps_fp32(case: V1Case) -> None:
    weights = start_weights(case)
    theirs = meta_v1_reference.run(case, weights, torch.float32)
    mine = ours_v1.run(case, weights, torch.float32)
    assert theirs.weights.keys() == mine.weights.keys()
    for reference, step in zip(theirs.steps, mine.steps, strict=True):
        assert reference.margin > 3e-6, "too near a kink of the L1 loss: choose another seed"
        assert step.loss == pytest.approx(reference.loss, rel=1e-5)
        assert step.gradients.keys() == reference.gradients.keys()
        for name, expected in reference.gradients.items():
            found = step.gradients[name]
            assert found is not None and expected is not None, name
            difference = relative_difference(zero_gradient(name, case, found), zero_gradient(name, case, expected))
            assert difference <= 1e-5, (name, difference)


@EVERY_CASE
def test_three_steps_fp64(case: V1Case) -> None:
    weights = start_weights(case)
    theirs = meta_v1_reference.run(case, weights, torch.float64)
    mine = ours_v1.run(case, weights, torch.float64)
    for reference, step in zip(theirs.steps, mine.steps, strict=True):
        assert step.loss == pytest.approx(reference.loss, rel=1e-12)
        assert step.lr == pytest.approx(reference.lr, rel=1e-12)
        assert step.weight_decay == pytest.approx(reference.weight_decay, rel=1e-12)
        assert step.momentum == pytest.approx(reference.momentum, rel=1e-12)
    for name, expected in theirs.weights.items():
        assert (mine.weights[name] - expected).abs().max().item() <= 1e-9, name
