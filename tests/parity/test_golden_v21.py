"""Ours against the numbers that V-JEPA 2.1's own code gave (golden/train_dense_*.json), without a checkout of it."""

from __future__ import annotations

import pytest
import torch

from . import ours, v21_ours
from .cases import recipe_weights
from .test_golden import compare_fp32, compare_fp64
from .v21_cases import DENSE_CASES, GOLDEN_CASES, DenseCase

EVERY_CASE = pytest.mark.parametrize("case", [DENSE_CASES[name] for name in GOLDEN_CASES], ids=GOLDEN_CASES)


def run(case: DenseCase, dtype: torch.dtype) -> ours.OurRun:
    shapes = {name: tuple(value.shape) for name, value in ours.weights_of(ours.build(case)[0]).items()}
    return v21_ours.run(case, recipe_weights(shapes, case.seed), dtype)


@EVERY_CASE
def test_training_fp64(case: DenseCase) -> None:
    compare_fp64(case, run(case, torch.float64))


@EVERY_CASE
def test_training_fp32(case: DenseCase) -> None:
    compare_fp32(case, run(case, torch.float32))
