"""MaskBatch: which tokens are context and which are predicted, packed for variable-length attention.

One MaskBatch describes M masks of each of B clips on one token grid. A (mask, clip) pair is a sequence; there are
S = M * B of them, mask by mask: sequence s belongs to mask s // B and clip s % B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.masking import loss_weights
from vjepa_fast.ops.packing import Packing

Grid = tuple[int, int, int]


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """From pinned memory, so that nobody waits for a GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)


@dataclass
class MaskBatch:
    """Packed masks of one frames-per-clip group.

    The lengths live on the host, so that nobody has to ask a device for them.
    """

    grid: Grid
    """Tokens of a clip along time, height and width."""
    num_masks: int
    batch_size: int
    context_ids: Tensor
    """int32 [sum(context_lengths), or the capacity]: token ids within the clip, ascending within a sequence; zeros
    behind the sum."""
    target_ids: Tensor
    """int32 [sum(target_lengths), or the capacity]."""
    context_lengths: tuple[int, ...]
    """Tokens of each of the S sequences."""
    target_lengths: tuple[int, ...]
    loss_weights: tuple[float, ...] | None = None
    """Weight of each target token of a sequence in the loss. None: the mean over the tokens of a (group, mask) pair,
    then over all pairs of the list handed to the model."""
    context_loss_weights: tuple[float, ...] | None = None
    """Weights of the context tokens, where they have a loss (V-JEPA 2.1). None: such that those of a sequence weigh
    together what its target tokens do."""
    mask_token: int | None = None
    """Which mask token the predictor uses; None: the place of this group in the list handed to the model."""
    offsets: Tensor | None = None
    """int32 [3, S + 1] beside the ids: cu_seqlens_context, cu_seqlens_target and cu_seqlens; None: made when asked."""
    capacity: tuple[int, int] | None = None
    """Elements of context_ids and target_ids where they are padded to a fixed size, as a CUDA graph wants them."""

    def __post_init__(self) -> None:
        num_sequences = self.num_masks * self.batch_size
        for name in ("context_lengths", "target_lengths", "loss_weights", "context_loss_weights"):
            value = getattr(self, name)
            if value is not None and len(value) != num_sequences:
                raise ValueError(
                    f"{name} has {len(value)} entries; expected one for each of the "
                    f"{self.num_masks} masks x {self.batch_size} clips"
                )
        totals = sum(self.context_lengths), sum(self.target_lengths)
        for ids, total, size in zip((self.context_ids, self.target_ids), totals, self.capacity or totals, strict=True):
            if total > size:
                raise ValueError(f"{total} tokens do not fit a capacity of {size}")
            if ids.numel() != size:
                raise ValueError(
                    f"{ids.numel()} packed ids but "
                    + (f"a capacity of {size}" if self.capacity else f"lengths that sum to {size}")
                )
        shape = (3, num_sequences + 1)
        if self.offsets is not None and tuple(self.offsets.shape) != shape:
            raise ValueError(f"offsets has shape {list(self.offsets.shape)}; expected {list(shape)}")

    @property
    def device(self) -> torch.device:
        return self.context_ids.device

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole clip."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @cached_property
    def cu_seqlens_context(self) -> Tensor:
        """int32 [S + 1]: where each sequence's context begins, ending with the total."""
        return _cumulative(self.context_lengths, self.device) if self.offsets is None else self.offsets[0]

    @cached_property
    def cu_seqlens_target(self) -> Tensor:
        """int32 [S + 1], the same for the targets."""
        return _cumulative(self.target_lengths, self.device) if self.offsets is None else self.offsets[1]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [S + 1], the same for context and targets of a sequence together, as the predictor sees them."""
        return _cumulative(self.total_lengths, self.device) if self.offsets is None else self.offsets[2]

    @property
    def context_packing(self) -> Packing:
        """How the context tokens lie."""
        return Packing(self.context_lengths, self.cu_seqlens_context)

    @property
    def target_packing(self) -> Packing:
        """How the target tokens lie."""
        return Packing(self.target_lengths, self.cu_seqlens_target)

    @property
    def packing(self) -> Packing:
        """How context and target tokens of all sequences lie, as the predictor sees them."""
        return Packing(self.total_lengths, self.cu_seqlens)

    @property
    def total_lengths(self) -> tuple[int, ...]:
        """Context and target tokens of each sequence together."""
        return tuple(c + t for c, t in zip(self.context_lengths, self.target_lengths, strict=True))

    def _sequence_of(self, ids: Tensor, lengths: Sequence[int], values: np.ndarray) -> Tensor:
        """values[s] for each packed id, with s its sequence; zeros behind the sum."""
        repeated = np.repeat(values, lengths)
        return to_device(np.pad(repeated, (0, len(ids) - len(repeated))), ids.device)

    def _clip_rows(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        clips = np.tile(np.arange(self.batch_size) * self.num_tokens, self.num_masks)
        return self._sequence_of(ids, lengths, clips) + ids

    @cached_property
    def context_rows(self) -> Tensor:
        """int64 [len(context_ids)]: rows of the context tokens in a [B * T * H * W, ...] buffer of the clips; row 0
        behind the sum."""
        return self._clip_rows(self.context_ids, self.context_lengths)

    @cached_property
    def target_rows(self) -> Tensor:
        """int64 [len(target_ids)], the same for the target tokens."""
        return self._clip_rows(self.target_ids, self.target_lengths)

    def token_weights(self, num_groups: int = 1) -> Tensor:
        """float64 [len(target_ids)]: loss weight of each target token, 0 behind the sum.

        Args:
            num_groups: over how many groups the loss is averaged; used where `loss_weights` is None.
        """
        weights = np.array(self.with_weights(num_groups).loss_weights)
        return self._sequence_of(self.target_ids, self.target_lengths, weights)

    def context_token_weights(self, num_groups: int = 1) -> Tensor:
        """float64 [len(context_ids)], the same for the context tokens."""
        weights = np.array(self.with_weights(num_groups).context_loss_weights)
        return self._sequence_of(self.context_ids, self.context_lengths, weights)

    def clip_weights(self, num_groups: int = 1) -> Tensor:
        """float64 [batch_size]: what the target tokens of each clip weigh together; see token_weights."""
        weights = np.array(self.with_weights(num_groups).loss_weights) * np.array(self.target_lengths)
        return to_device(weights.reshape(self.num_masks, self.batch_size).sum(0), self.device)

    def with_weights(self, num_groups: int = 1) -> MaskBatch:
        """The same masks with explicit loss weights; see token_weights."""
        if self.loss_weights is None:
            target, context = (
                loss_weights.mean_over_tokens(lengths, self.num_masks, num_groups)
                for lengths in (self.target_lengths, self.context_lengths)
            )
            return replace(self, loss_weights=target, context_loss_weights=context)
        if self.context_loss_weights is None:
            spread = loss_weights.over_context(self.loss_weights, self.target_lengths, self.context_lengths)
            return replace(self, context_loss_weights=spread)
        return self

    def scaled(self, factor: float) -> MaskBatch:
        """The same masks with explicit loss weights, multiplied."""
        weighed = self.with_weights()
        assert weighed.loss_weights is not None and weighed.context_loss_weights is not None
        return replace(
            weighed,
            loss_weights=tuple(factor * weight for weight in weighed.loss_weights),
            context_loss_weights=tuple(factor * weight for weight in weighed.context_loss_weights),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskBatch:
        """The same masks with their ids on another device."""
        return replace(
            self,
            context_ids=self.context_ids.to(device, non_blocking=non_blocking),
            target_ids=self.target_ids.to(device, non_blocking=non_blocking),
            offsets=None if self.offsets is None else self.offsets.to(device, non_blocking=non_blocking),
        )

    def padded(self, capacity: tuple[int, int]) -> MaskBatch:
        """The same masks with context_ids and target_ids of a fixed size, zeros behind the sums of the lengths.

        Raises:
            ValueError: the ids do not fit.
        """
        totals = sum(self.context_lengths), sum(self.target_lengths)
        if totals[0] > capacity[0] or totals[1] > capacity[1]:
            raise ValueError(
                f"{totals[0]} context and {totals[1]} target tokens do not fit a capacity of "
                f"{capacity[0]} and {capacity[1]}"
            )
        ids = (
            F.pad(own[:total], (0, size - total))
            for own, total, size in zip((self.context_ids, self.target_ids), totals, capacity, strict=True)
        )
        return replace(self, context_ids=next(ids), target_ids=next(ids), capacity=capacity)

    def _split(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Context and target ids of each sequence."""
        context, target = (
            ids[: sum(lengths)].split(list(lengths))
            for ids, lengths in ((self.context_ids, self.context_lengths), (self.target_ids, self.target_lengths))
        )
        return context, target

    def narrow(self, start: int, stop: int) -> MaskBatch:
        """The masks of clips start .. stop - 1 only, without padding; loss weights that were set are kept."""
        keep = [m * self.batch_size + b for m in range(self.num_masks) for b in range(start, stop)]
        context, target = self._split()
        return replace(
            self,
            batch_size=stop - start,
            context_ids=torch.cat([context[s] for s in keep]),
            target_ids=torch.cat([target[s] for s in keep]),
            context_lengths=tuple(self.context_lengths[s] for s in keep),
            target_lengths=tuple(self.target_lengths[s] for s in keep),
            loss_weights=None if self.loss_weights is None else tuple(self.loss_weights[s] for s in keep),
            context_loss_weights=None
            if self.context_loss_weights is None
            else tuple(self.context_loss_weights[s] for s in keep),
            offsets=None,
            capacity=None,
        )

    @classmethod
    def from_meta(cls, masks_enc: Sequence[Tensor], masks_pred: Sequence[Tensor], grid: Grid) -> MaskBatch:
        """From the reference's index lists.

        Args:
            masks_enc: for each mask, int64 [B, K] ids of the context tokens.
            masks_pred: for each mask, int64 [B, K'] ids of the tokens to predict.
            grid: (T, H, W) in tokens.

        Raises:
            ValueError: the lists differ in length, or an id lies outside the grid.
        """
        if len(masks_enc) != len(masks_pred) or not masks_enc:
            raise ValueError(
                f"{len(masks_enc)} context masks and {len(masks_pred)} prediction masks; "
                "expected the same number, at least one"
            )
        batch_size = masks_enc[0].shape[0]
        num_tokens = grid[0] * grid[1] * grid[2]
        for ids in (*masks_enc, *masks_pred):
            if ids.ndim != 2 or ids.shape[0] != batch_size:
                raise ValueError(f"a mask has shape {list(ids.shape)}; expected [{batch_size}, K]")
            if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < num_tokens):
                raise ValueError(
                    f"a mask holds ids {int(ids.min())} to {int(ids.max())}; "
                    f"a grid of {grid} has tokens 0 to {num_tokens - 1}"
                )
        context_lengths = tuple(ids.shape[1] for ids in masks_enc for _ in range(batch_size))
        target_lengths = tuple(ids.shape[1] for ids in masks_pred for _ in range(batch_size))
        return cls(
            grid=grid,
            num_masks=len(masks_enc),
            batch_size=batch_size,
            context_ids=torch.cat([ids.reshape(-1) for ids in masks_enc]).to(torch.int32),
            target_ids=torch.cat([ids.reshape(-1) for ids in masks_pred]).to(torch.int32),
            context_lengths=context_lengths,
            target_lengths=target_lengths,
        )

    def to_meta(self) -> tuple[list[Tensor], list[Tensor]]:
        """The reference's index lists: (masks_enc, masks_pred), for each mask int64 [B, K].

        Raises:
            ValueError: clips of one mask differ in length (`truncate: none`), which the lists cannot hold.
        """
        out: list[list[Tensor]] = []
        for ids, lengths in ((self.context_ids, self.context_lengths), (self.target_ids, self.target_lengths)):
            rows: list[Tensor] = []
            offset = 0
            for m in range(self.num_masks):
                own = lengths[m * self.batch_size : (m + 1) * self.batch_size]
                if len(set(own)) != 1:
                    raise ValueError(
                        f"clips of mask {m} keep {min(own)} to {max(own)} tokens; index lists need one "
                        "length a mask (use truncate: batch_min)"
                    )
                rows.append(ids[offset : offset + sum(own)].view(self.batch_size, own[0]).long())
                offset += sum(own)
            out.append(rows)
        return out[0], out[1]

    @classmethod
    def from_dense(cls, target: Tensor, context: Tensor | None = None, grid: Grid | None = None) -> MaskBatch:
        """From boolean masks.

        Args:
            target: bool [B, T, H, W], or [B, T, H * W] with `grid` given, or the same with a leading dimension M for
                several masks: true where a token is predicted.
            context: the same shape, true where a token is seen; None: all tokens that are not predicted.
            grid: (T, H, W) in tokens; needed unless the last two dimensions are height and width.

        Raises:
            ValueError: shapes that do not fit, an empty context, or a token that is both seen and predicted.
        """
        if target.dtype != torch.bool:
            raise ValueError(f"target has dtype {target.dtype}; expected torch.bool")
        if grid is None:
            if target.ndim < 4:
                raise ValueError(f"target has shape {list(target.shape)}; give grid=(T, H, W) for flattened masks")
            grid = (target.shape[-3], target.shape[-2], target.shape[-1])
            target = target.flatten(-2)
            context = context.flatten(-2) if context is not None else None
        num_tokens = grid[0] * grid[1] * grid[2]
        if target.ndim not in (3, 4) or target.shape[-2] * target.shape[-1] != num_tokens:
            raise ValueError(f"target has shape {list(target.shape)}, which does not hold a grid of {tuple(grid)}")
        if context is None:
            context = ~target
        if context.shape != target.shape:
            raise ValueError(f"context has shape {list(context.shape)}, target {list(target.shape)}; expected equal")
        num_masks = target.shape[0] if target.ndim == 4 else 1
        dense = [x.reshape(num_masks, -1, num_tokens) for x in (context, target)]
        if (dense[0] & dense[1]).any():
            raise ValueError("a token is both context and target")
        return cls.from_bool(dense[0], dense[1], grid)

    @classmethod
    def from_bool(cls, context: Tensor, target: Tensor, grid: Grid) -> MaskBatch:
        """From bool [M, B, T * H * W], without the checks of from_dense except that no context is empty."""
        num_masks, batch_size, num_tokens = context.shape
        lengths = [tuple(x.sum(-1).flatten().tolist()) for x in (context, target)]
        if min(lengths[0], default=1) == 0:
            raise ValueError("a clip has no context token left")
        ids = [x.reshape(-1, num_tokens).nonzero()[:, 1].to(torch.int32) for x in (context, target)]
        return cls(
            grid=grid,
            num_masks=num_masks,
            batch_size=batch_size,
            context_ids=ids[0],
            target_ids=ids[1],
            context_lengths=lengths[0],
            target_lengths=lengths[1],
        )
