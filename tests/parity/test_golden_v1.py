"""Ours against the numbers that V-JEPA 1's own code gave (golden/train_v1_*.json), without a checkout of it."""

from __future__ import annotations

import pytest
import torch

from . import ours, ours_v1
from .cases import recipe_weights
from .test_golden import compare_fp32, compare_fp64
from .v1_cases import V1_CASES, V1Case

EVERY_CASE = pytest.mark.parametrize("case", V1_CASES.values(), ids=V1_CASES.keys())


def run(case: V1Case, dtype: torch.dtype) -> ours.OurRun:
    shapes = {name: tuple(value.shape) for name, value in ours.weights_of(ours.build(case)[0]).items()}
    return ours_v1.run(case, recipe_weights(shapes, case.seed), dtype)


@EVERY_CASE
def test_training_fp64(case: V1Case) -> None:
    compare_fp64(case, run(case, torch.float64))


@EVERY_CASE
def test_training_fp32(case: V1Case) -> None:
    compare_fp32(case, run(case, torch.float32))
