"""Ours against the numbers that the references' own code gave (golden/*.json), without a checkout of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vjepa_fast.config.schema import MaskConfig
from vjepa_fast.masking.reference import ReferenceMaskGenerators

from . import golden_format, ours
from .cases import Case, recipe_weights, zero_gradient
from .mask_cases import MASK_CASES, MaskCase
from .release import Release, of_every_case


def run(release: Release, case: Case, dtype: torch.dtype) -> ours.OurRun:
    shapes = {name: tuple(value.shape) for name, value in ours.weights_of(ours.build(case)[0]).items()}
    return release.run_ours(case, recipe_weights(shapes, case.seed), dtype)


def assert_summary(name: str, found: torch.Tensor, expected: list[float], tolerance: float) -> None:
    """A difference of relative norm `tolerance` moves the projection by about tolerance * norm, at most a few times."""
    norm, projection = golden_format.summary(name, found)
    assert norm == pytest.approx(expected[0], rel=tolerance), name
    assert projection == pytest.approx(expected[1], abs=4 * tolerance * expected[0]), name


def assert_gradients(
    case: Case, found: dict[str, torch.Tensor | None], expected: dict[str, Any], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        gradient = found[name]
        if numbers is None:
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None, name
            assert_summary(name, zero_gradient(name, case, gradient), numbers, tolerance)


@of_every_case(golden=True)
def test_training_fp64(release: Release, case: Case) -> None:
    mine = run(release, case, torch.float64)
    golden = golden_format.read(f"train_{case.name}")
    for step, expected in zip(mine.steps, golden["steps"], strict=True):
        for key in ("loss", "lr", "weight_decay", "momentum"):
            assert getattr(step, key) == pytest.approx(expected[key], rel=1e-10), key
        assert_gradients(case, step.gradients, expected["gradients"], 1e-9)
    assert mine.weights.keys() == golden["weights"].keys()
    for name, numbers in golden["weights"].items():
        assert_summary(name, mine.weights[name], numbers, 1e-9)


@of_every_case(golden=True)
def test_training_fp32(release: Release, case: Case) -> None:
    mine = run(release, case, torch.float32)
    golden = golden_format.read(f"train_{case.name}")
    for step, expected in zip(mine.steps, golden["steps"], strict=True):
        assert step.loss == pytest.approx(expected["loss"], rel=1e-5)
    # Later steps start from weights that rounding has moved; their gradients are compared in fp64.
    assert_gradients(case, mine.steps[0].gradients, golden["steps"][0]["gradients"], 1e-5)


@pytest.mark.parametrize("case", MASK_CASES.values(), ids=MASK_CASES.keys())
def test_masks(case: MaskCase) -> None:
    expected = golden_format.read("masks")["sha256_of_batches"][case.name]
    masks = ReferenceMaskGenerators(
        MaskConfig.model_validate(case.masks),
        fpcs=case.fpcs,
        crop_size=(case.crop_size, case.crop_size),
        patch_size=case.patch_size,
        tubelet_size=case.tubelet_size,
    )
    torch.manual_seed(case.seed)
    found = [golden_format.mask_hash(masks(batch_sizes=case.batch_sizes(i))) for i in range(len(expected))]
    assert found == expected
