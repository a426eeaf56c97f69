"""Mask configurations that are compared with the reference's collator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Masks = dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]
"""Frames per clip -> (context, target), each a list over masks of int64 [B, K]."""

SHORT = {"spatial_scale": (0.15, 0.15), "temporal_scale": (1.0, 1.0), "aspect_ratio": (0.75, 1.5), "num_blocks": 8}
LONG = {"spatial_scale": (0.7, 0.7), "temporal_scale": (1.0, 1.0), "aspect_ratio": (0.75, 1.5), "num_blocks": 2}
# Blocks that differ in length too, and small enough to leave contexts of many sizes.
VARIED = {"spatial_scale": (0.2, 0.8), "temporal_scale": (0.5, 1.0), "aspect_ratio": (0.3, 3.0), "num_blocks": 2}


@dataclass(frozen=True)
class MaskCase:
    name: str
    masks: list[dict[str, Any]]
    fpcs: list[int]
    largest_batch: int = 4
    crop_size: int = 128
    patch_size: int = 16
    tubelet_size: int = 2
    seed: int = 17

    def batch_sizes(self, index: int) -> dict[int, int]:
        """Clips of each group in batch `index`; with several groups every share occurs, none at all included."""
        if len(self.fpcs) == 1:
            return {self.fpcs[0]: self.largest_batch}
        first = index % (self.largest_batch + 1)
        return {self.fpcs[0]: first, self.fpcs[1]: self.largest_batch - first}


MASK_CASES = {
    case.name: case
    for case in (
        MaskCase("vjepa2", [SHORT, LONG], [16], largest_batch=24, crop_size=256),
        MaskCase("varied", [VARIED], [16]),
        MaskCase("max_keep", [{**VARIED, "max_keep": 30}], [16]),
        MaskCase(
            "max_temporal_keep", [{**VARIED, "max_temporal_keep": 0.5}, {**SHORT, "max_temporal_keep": 0.1}], [16]
        ),
        MaskCase("full_complement", [{**VARIED, "full_complement": True}], [16]),
        MaskCase("pred_full_complement", [{**VARIED, "pred_full_complement": True}, SHORT], [16]),
        MaskCase("inv_block", [{**VARIED, "inv_block": True}, {**VARIED, "inv_block": True, "max_keep": 20}], [16]),
        MaskCase("mixed_frames", [SHORT, VARIED], [16, 8]),
    )
}
