"""MaskCollator beside the collators of V-JEPA 1 and 2: with their random numbers the same output, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vjepa_fast.swapping.mask_collator import MaskCollator

from . import reference_v1, reference_v2
from .mask_cases import MASK_CASES, SHORT, VARIED, MaskCase


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def sample(frames: int) -> Any:
    return [torch.zeros(1)], 0, [np.arange(frames)]


@reference_v2.needs_reference
@pytest.mark.parametrize("name", ["varied", "max_keep", "pred_full_complement", "inv_block", "mixed_frames"])
def test_v2(name: str) -> None:
    case: MaskCase = MASK_CASES[name]
    options = {
        "cfgs_mask": case.masks,
        "dataset_fpcs": case.fpcs,
        "crop_size": case.crop_size,
        "patch_size": case.patch_size,
        "tubelet_size": case.tubelet_size,
    }
    outputs = []
    for collator in (reference_v2.modules().masks.MaskCollator(**options), MaskCollator(**options, source="reference")):
        torch.manual_seed(3)
        collator.step()
        outputs.append(
            [
                collator([sample(frames) for frames, count in case.batch_sizes(index).items() for _ in range(count)])
                for index in range(5)
            ]
        )
    assert_equal(outputs[1], outputs[0])


@reference_v1.needs_reference
@pytest.mark.parametrize("kind", ["multiblock", "tube"])
def test_v1(kind: str) -> None:
    masks: list[dict[str, Any]] = [SHORT, VARIED] if kind == "multiblock" else [{"ratio": 0.9}, {"ratio": 0.45}]
    options = {"cfgs_mask": masks, "crop_size": (96, 96), "num_frames": 8, "patch_size": 16, "tubelet_size": 2}
    theirs = getattr(reference_v1.modules(), kind).MaskCollator(**options)
    outputs = []
    for collator in (theirs, MaskCollator(**options, source="reference")):
        torch.manual_seed(3)
        np.random.seed(3)
        collator.step()
        outputs.append([collator([sample(8)] * 3) for _ in range(5)])
    assert_equal(outputs[1], outputs[0])


@reference_v2.needs_reference
def test_shapes_from_our_sampler() -> None:
    """Masks are others, but batches look the same."""
    case = MASK_CASES["mixed_frames"]
    options = {
        "cfgs_mask": case.masks,
        "dataset_fpcs": case.fpcs,
        "crop_size": case.crop_size,
        "patch_size": case.patch_size,
        "tubelet_size": case.tubelet_size,
    }
    batch = [sample(frames) for frames in (16, 8, 16, 8)]

    def shape(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.ndim, value.dtype, len(value)
        return type(value), [shape(one) for one in value]

    assert shape(MaskCollator(**options)(batch)) == shape(reference_v2.modules().masks.MaskCollator(**options)(batch))
