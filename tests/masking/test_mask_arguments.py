"""What the compiled mask operators refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.masking.mask_cases import NAMES, needs_extension
from vjepa_fast.config.mask_strategies import STRATEGIES
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.masking import mask_sample as mask_ops
from vjepa_fast.masking.mask_rules import BlockSpec


def spec_with(place: int, value: int) -> list[int]:
    ints = MaskSpec()
    row = BlockSpec.from_config(ints, (4, 6, 6)).to_ints()
    row[place] = value
    return row


STEP, IDS = torch.tensor([0]), torch.arange(3)
ROW = BlockSpec.from_config(MaskSpec(), (4, 6, 6)).to_ints()
BAD_COMMON = [
    ({"step": torch.tensor([0, 1])}, "step is no int64 tensor of one element"),
    ({"step": torch.tensor([0.0])}, "step is no int64 tensor"),
    ({"sample_ids": IDS.int()}, "sample_ids has dtype Int; expected Long"),
    ({"sample_ids": IDS.view(1, 3)}, r"sample_ids has shape \[1, 3\]; expected \[any\]"),
    ({"sample_ids": torch.arange(6)[::2]}, "sample_ids is not contiguous"),
    ({"sample_ids": -IDS}, "sample_ids holds -1; global sample numbers count from 0"),
    ({"specs": ROW[:-1]}, "specs has 13 integers; expected 14 a mask"),
    ({"specs": []}, "specs has 0 integers"),
    ({"specs": ROW * 65}, "for 1 to 64 masks"),
    ({"grid": [4, 6]}, "grid has 2 entries"),
    ({"grid": [4, 0, 6]}, "a side of grid is 0"),
    ({"grid": [2**40, 2**40, 6]}, "a side of grid is"),
    ({"grid": [65, 64, 64]}, "number of tokens of grid is 266240; expected 1 to 262144"),
    ({"grid": [1, 6, 6]}, "max_context_frames of specs is 4; expected 1 to 1"),
    ({"group": 16}, "group is 16; expected 0 to 15"),
    ({"sample_ids": torch.zeros(2**31 // 144 + 1, dtype=torch.int64)}, "Use a smaller batch"),
    *(
        ({"specs": spec_with(place, value)}, message)
        for place, value, message in (
            (0, len(NAMES), f"strategy of specs is {len(NAMES)}; expected 0 to {len(NAMES) - 1}"),
            (0, -1, "strategy"),
            (1, 0, "num_blocks"),
            (1, 1025, "num_blocks of specs is 1025; expected 1 to 1024"),
            (2, 0, "temporal scale"),
            (2, 2**24 + 1, "temporal scale"),
            (3, -1, "temporal scale"),
            (4, -(2**24), "spatial scale of specs is -16777216"),
            (5, 2**62, "spatial scale"),
            (6, 0, "aspect ratio"),
            (7, 255 * 2**24, "aspect ratio"),
            (8, 0, "ratio of specs"),
            (9, -1, "temporal probability"),
            (9, 2**32 + 1, "temporal probability"),
            (10, 0, "max_context_frames"),
            (10, 5, "max_context_frames"),
            (11, -1, "max_keep"),
            (11, 145, "max_keep"),
            (12, 3, "complement"),
            (13, 2, "inv_block"),
        )
    ),
]


def arguments_of(name: str, changed: dict[str, Any]) -> list[Any]:
    common = {"specs": ROW, "grid": [4, 6, 6], "seed": 1, "group": 0}
    values: dict[str, dict[str, Any]] = {
        "mask_lengths": {"step": STEP, "sample_ids": IDS, "members": IDS, **common, "group_size": -1},
        "mask_sample": {
            "step": STEP,
            "sample_ids": IDS,
            "lengths": torch.zeros(2, 3, dtype=torch.int32),
            **common,
            "capacity_context": 432,
            "capacity_target": 432,
        },
    }
    return list({**values[name], **changed}.values())


@needs_extension
@pytest.mark.parametrize("name", ["mask_lengths", "mask_sample"])
@pytest.mark.parametrize(("changed", "message"), BAD_COMMON, ids=range(len(BAD_COMMON)))
def test_bad_arguments_of_both(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(mask_ops.operators(), name)(*arguments_of(name, changed))


@needs_extension
@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("mask_lengths", {"group_size": -2}, "group_size is -2"),
        ("mask_lengths", {"members": IDS[:2].clone()}, "sample 2 is not among the members"),
        ("mask_lengths", {"members": IDS.float()}, "members has dtype Float"),
        ("mask_lengths", {"members": IDS - 1}, "members holds -1"),
        ("mask_sample", {"lengths": torch.zeros(2, 3)}, "lengths has dtype Float; expected Int"),
        (
            "mask_sample",
            {"lengths": torch.zeros(2, 4, dtype=torch.int32)},
            r"lengths has shape \[2, 4\]; expected \[2, 3",
        ),
        ("mask_sample", {"lengths": torch.full((2, 3), -1, dtype=torch.int32)}, "an entry of lengths is -1"),
        ("mask_sample", {"lengths": torch.full((2, 3), 145, dtype=torch.int32)}, "expected 0 to 144"),
        ("mask_sample", {"lengths": torch.full((2, 3), 100, dtype=torch.int32)}, "context and target of a sequence"),
        (
            "mask_sample",
            {"lengths": torch.tensor([[144] * 3, [0] * 3], dtype=torch.int32)},
            "do not belong to the masks",
        ),
        (
            "mask_sample",
            {"lengths": torch.ones(2, 3, dtype=torch.int32), "capacity_target": 2},
            "the masks hold 3 target tokens, more than capacity_target 2",
        ),
        ("mask_sample", {"capacity_context": -1}, "capacity_context is -1"),
        ("mask_sample", {"capacity_context": 2**31}, "capacity_context is 2147483648"),
    ],
)
def test_bad_arguments_of_one(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(mask_ops.operators(), name)(*arguments_of(name, changed))


@needs_extension
def test_places_and_frames_that_the_counter_cannot_name() -> None:
    tube, patches = ([STRATEGIES[name].number, *ROW[1:]] for name in ("tube", "patches"))
    with pytest.raises(RuntimeError, match="4160 places a frame"):
        mask_ops.operators().mask_lengths(*arguments_of("mask_lengths", {"specs": tube, "grid": [4, 65, 64]}))
    with pytest.raises(RuntimeError, match="257 frames"):
        mask_ops.operators().mask_lengths(*arguments_of("mask_lengths", {"specs": patches, "grid": [257, 2, 2]}))
