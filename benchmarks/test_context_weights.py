"""What context tokens weigh by their distance to the predicted ones, once a step and mask batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vjepa_fast.bench.workload import Workload
from vjepa_fast.models.context_weights import context_weights


def test_context_weights(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    masks = workload.masks(device)
    places = (masks.num_masks * masks.batch_size + 1) * masks.num_tokens
    sides = sum(masks.grid)
    # Each axis broadcasts all places against its own, adds, and takes the least.
    measure(
        lambda: context_weights(
            masks.context_ids, masks.cu_seqlens_context, masks.target_ids, masks.cu_seqlens_target, masks.grid
        ),
        num_bytes=8 * places * sides,
        flops=2 * places * sides,
    )
