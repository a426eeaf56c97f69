"""The reference's mask collator, called directly in one process, beside ours under the same torch seed."""

from __future__ import annotations

import pytest
import torch

from vjepa_fast.config.schema import MaskConfig
from vjepa_fast.masking.reference import ReferenceMaskGenerators

from . import reference_v2
from .mask_cases import MASK_CASES, MaskCase, Masks

pytestmark = reference_v2.needs_reference


def generators(case: MaskCase) -> ReferenceMaskGenerators:
    side = (case.crop_size, case.crop_size)
    return ReferenceMaskGenerators(
        MaskConfig.model_validate(case.masks),
        fpcs=case.fpcs,
        crop_size=side,
        patch_size=case.patch_size,
        tubelet_size=case.tubelet_size,
    )


def assert_equal(found: Masks, expected: Masks) -> None:
    assert list(found) == list(expected)
    for fpc, pair in expected.items():
        for ours, theirs in zip(found[fpc], pair, strict=True):
            for mine, reference in zip(ours, theirs, strict=True):
                assert mine.dtype == reference.dtype
                assert torch.equal(mine, reference)


@pytest.mark.parametrize("case", MASK_CASES.values(), ids=MASK_CASES.keys())
def test_one_hundred_batches(case: MaskCase) -> None:
    theirs, mine = reference_v2.collator(case), generators(case)
    torch.manual_seed(case.seed)
    expected = [reference_v2.collate(theirs, case.batch_sizes(i)) for i in range(100)]
    torch.manual_seed(case.seed)
    found = [mine(batch_sizes=case.batch_sizes(i)) for i in range(100)]
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)


def test_step_moves_the_block_sizes_as_on_resume() -> None:
    case = MASK_CASES["mixed_frames"]
    theirs, mine = reference_v2.collator(case), generators(case)
    for _ in range(7):
        theirs.step()
        mine.step()
    for i in range(3):
        torch.manual_seed(i)
        expected = reference_v2.collate(theirs, case.batch_sizes(i))
        torch.manual_seed(i)
        assert_equal(mine(batch_sizes=case.batch_sizes(i)), expected)
