"""Masks in buffers of fixed size and address, refilled for each step, for CUDA graphs.

Nothing that depends on a step's masks is a python number here: where sequences begin, what they weigh in the loss and
which rows they read is worked out on the device, so that a replayed graph finds the numbers of its own step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.masking.batch import MaskBatch, to_device
from vjepa_fast.ops.packing import Packing, sequence_of_rows


class Sizes(NamedTuple):
    """Tokens of a batch, or room for them."""

    context: int
    """Context tokens of all sequences together; `target`: predicted ones."""
    target: int
    longest_context: int
    """Of one sequence; likewise longest_target, and `longest` of both together."""
    longest_target: int
    longest: int

    @classmethod
    def of(cls, masks: MaskBatch) -> Sizes:
        """What a batch needs."""
        context, target = masks.context_lengths, masks.target_lengths
        return cls(sum(context), sum(target), max(context), max(target), max(masks.total_lengths))

    @classmethod
    def around(cls, sizes: Iterable[Sizes]) -> Sizes:
        """The smallest that hold all of these."""
        return cls(*map(max, zip(*sizes, strict=True)))

    def rounded(self, unit: int) -> Sizes:
        """Up to multiples of `unit`."""
        return Sizes(*(-(-size // unit) * unit for size in self))

    def fits(self, room: Sizes) -> bool:
        """Whether all of it fits."""
        return all(size <= limit for size, limit in zip(self, room, strict=True))


@dataclass
class DynamicMasks(MaskBatch):
    """A MaskBatch whose lengths are upper bounds for the host; those that count are in `offsets`.

    What is worked out from the buffers is kept, as in a MaskBatch: take `dataclasses.replace(masks)` after a refill.
    """

    weights: Tensor = field(kw_only=True)
    """float64 [S]: weight of each target token of a sequence in the loss."""
    weights_of_context: Tensor = field(kw_only=True)
    """float64 [S], the same for context tokens."""
    longest: int = field(kw_only=True)
    """Context and target tokens of a sequence together, at most."""

    def __post_init__(self) -> None:
        """Bounds may sum to more than the capacity."""

    @classmethod
    def like(cls, masks: MaskBatch, room: Sizes) -> DynamicMasks:
        """Buffers for masks of this kind, on their device, to be filled."""
        num_sequences, device = masks.num_masks * masks.batch_size, masks.device
        context_ids, target_ids = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in (room.context, room.target)
        )
        return cls(
            grid=masks.grid,
            num_masks=masks.num_masks,
            batch_size=masks.batch_size,
            context_ids=context_ids,
            target_ids=target_ids,
            context_lengths=(room.longest_context,) * num_sequences,
            target_lengths=(room.longest_target,) * num_sequences,
            mask_token=masks.mask_token,
            offsets=torch.zeros((3, num_sequences + 1), dtype=torch.int32, device=device),
            capacity=(room.context, room.target),
            weights=torch.zeros(num_sequences, dtype=torch.float64, device=device),
            weights_of_context=torch.zeros(num_sequences, dtype=torch.float64, device=device),
            longest=room.longest,
        )

    def fill(self, masks: MaskBatch) -> None:
        """Take over other masks of the same kind that fit; nothing waits for a GPU."""
        assert self.offsets is not None
        totals = sum(masks.context_lengths), sum(masks.target_lengths)
        for own, ids, total in zip(
            (self.context_ids, self.target_ids), (masks.context_ids, masks.target_ids), totals, strict=True
        ):
            own[:total].copy_(ids[:total])
            own[total:].zero_()
        offsets = masks.offsets
        if offsets is None:
            offsets = torch.stack([masks.cu_seqlens_context, masks.cu_seqlens_target, masks.cu_seqlens])
        self.offsets.copy_(offsets)
        weighed = masks.with_weights()
        for own, weights in (
            (self.weights, weighed.loss_weights),
            (self.weights_of_context, weighed.context_loss_weights),
        ):
            own.copy_(to_device(np.array(weights, dtype=np.float64), self.device))

    @property
    def context_packing(self) -> Packing:
        return Packing(self.context_lengths, self.cu_seqlens_context, dynamic=True)

    @property
    def target_packing(self) -> Packing:
        return Packing(self.target_lengths, self.cu_seqlens_target, dynamic=True)

    @property
    def packing(self) -> Packing:
        return Packing((self.longest,) * len(self.context_lengths), self.cu_seqlens, dynamic=True)

    def _rows(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        sequence = sequence_of_rows(cu_seqlens, len(ids))
        rows = sequence % self.batch_size * self.num_tokens + ids
        return rows.masked_fill(sequence == len(self.context_lengths), 0)

    @cached_property
    def context_rows(self) -> Tensor:
        return self._rows(self.context_ids, self.cu_seqlens_context)

    @cached_property
    def target_rows(self) -> Tensor:
        return self._rows(self.target_ids, self.cu_seqlens_target)

    def token_weights(self, num_groups: int = 1) -> Tensor:
        """As of a MaskBatch; `num_groups` was decided when the buffers were filled."""
        sequence = sequence_of_rows(self.cu_seqlens_target, len(self.target_ids))
        return F.pad(self.weights, (0, 1)).index_select(0, sequence)

    def context_token_weights(self, num_groups: int = 1) -> Tensor:
        """As of a MaskBatch; `num_groups` was decided when the buffers were filled."""
        sequence = sequence_of_rows(self.cu_seqlens_context, len(self.context_ids))
        return F.pad(self.weights_of_context, (0, 1)).index_select(0, sequence)

    def clip_weights(self, num_groups: int = 1) -> Tensor:
        """As of a MaskBatch; `num_groups` was decided when the buffers were filled."""
        together = self.weights * self.cu_seqlens_target.diff()
        return together.view(self.num_masks, self.batch_size).sum(0)
