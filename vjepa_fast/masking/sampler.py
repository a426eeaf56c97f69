"""Masks for training: counter-based, the same for a global sample number wherever it lands.

`MaskSampler` makes the masks of one frames-per-clip group. `StepMasks` makes those of a whole batch, with the loss
weights that make the loss of a step independent of how the step is spread over processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import MaskConfig
from vjepa_fast.masking import loss_weights
from vjepa_fast.masking.batch import Grid, MaskBatch
from vjepa_fast.masking.mask_rules import BlockSpec
from vjepa_fast.masking.mask_sample import mask_sample
from vjepa_fast.masking.reference import ReferenceMaskGenerators


class MaskSampler:
    """Masks as a pure function of (seed, step, global sample numbers), by the rules of vjepa_fast.masking.mask_rules.

    Args:
        cfg: the masks, the truncation rule and the size of a truncation group.
        grid: (T, H, W) in tokens.
        seed: of the run.
        group: which frames-per-clip group this is; groups draw independent masks.

    Raises:
        ConfigError: masks that are not drawn from counters, or a grid that is too large for them.
    """

    def __init__(self, cfg: MaskConfig, grid: Grid, seed: int, group: int = 0) -> None:
        if cfg.source == "reference":
            raise ConfigError("mask.source is reference: use ReferenceMaskGenerators, or set mask.source=counter")
        self.cfg = cfg
        self.grid = grid
        self.seed = seed
        self.group = group
        self.specs = [BlockSpec.from_config(spec, grid) for spec in cfg.masks]
        # As truncation_parts takes it: without a size the batch is the group.
        self.group_size = 0 if cfg.truncate == "none" else cfg.group_size or -1

    def _members(self, sample_ids: np.ndarray) -> np.ndarray:
        if self.group_size <= 0:
            return sample_ids
        groups = np.unique(sample_ids // self.group_size)
        return (groups[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)

    def __call__(
        self,
        step: int,
        sample_ids: Sequence[int] | np.ndarray | Tensor,
        device: torch.device | str = "cpu",
        members: np.ndarray | None = None,
        capacity: tuple[int, int] | None = None,
    ) -> MaskBatch:
        """Packed masks of the given samples.

        With `group_size` unset, the truncation group is the given batch.

        Args:
            step: of the run.
            sample_ids: [B] global sample numbers.
            device: where the ids shall be; a GPU makes them itself and is not waited for.
            members: every global sample number of this group in the truncation groups of `sample_ids`; None: all
                consecutive numbers (right when there is one group).
            capacity: elements of context_ids and target_ids, see MaskBatch.

        Raises:
            ValueError: the capacity is too small, or a sample is not among the members.
        """
        ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
        members = self._members(ids) if members is None else np.ascontiguousarray(members, dtype=np.int64)
        packed = mask_sample(
            self.specs,
            self.grid,
            ids,
            members,
            seed=self.seed,
            step=step,
            group=self.group,
            group_size=self.group_size,
            device=device,
            capacity=capacity,
        )
        return MaskBatch(
            grid=self.grid,
            num_masks=len(self.specs),
            batch_size=len(ids),
            context_ids=packed.context_ids,
            target_ids=packed.target_ids,
            context_lengths=packed.context_lengths,
            target_lengths=packed.target_lengths,
            offsets=packed.cu_seqlens,
            capacity=capacity,
        )


class StepMasks:
    """Masks of a whole batch: one MaskBatch for each frames-per-clip group present.

    The loss of a step is the mean the reference takes on each of its processes (over tokens and features of a (group,
    mask) pair, then over the pairs present), averaged over truncation groups; with `truncate: none` the mean over all
    tokens of a pair in the step, then over the pairs. Each target token therefore has a weight that depends on the
    step only, and the weights of all processes and micro-batches of a step add up to 1.

    With `clips_per_mask` n, the n sample numbers from n * u on have the masks of number u.

    Args:
        cfg: masks.
        fpcs: frames per clip of each group, in the order of the configuration.
        crop_size: pixels, (height, width).
        patch_size, tubelet_size: pixels and frames of a token.
        seed: of the run.
        global_batch: clips of a step over all processes.
        group_of: maps global sample numbers to group indices, for samples of any process.
        rank, world_size: this process.
        sum_over_processes: adds an int64 tensor up over all processes, in place.

    Raises:
        ConfigError: truncation groups that do not fit into a step.
    """

    def __init__(
        self,
        cfg: MaskConfig,
        *,
        fpcs: list[int],
        crop_size: tuple[int, int],
        patch_size: int,
        tubelet_size: int,
        seed: int,
        global_batch: int,
        group_of: Callable[[np.ndarray], np.ndarray],
        rank: int = 0,
        world_size: int = 1,
        sum_over_processes: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.cfg = cfg
        self.fpcs = fpcs
        self.global_batch = global_batch
        self.group_of = group_of
        self.world_size = world_size
        self.sum_over_processes = sum_over_processes
        height, width = (side // patch_size for side in crop_size)
        self.grids: list[Grid] = [(max(1, fpc // tubelet_size), height, width) for fpc in fpcs]
        self.reference: ReferenceMaskGenerators | None = None
        self.positions = torch.Generator().manual_seed(seed + rank)
        if cfg.source == "reference":
            if cfg.truncate == "none":
                raise ConfigError(
                    "mask.source=reference always truncates to the batch minimum; set "
                    "mask.truncate=batch_min, or mask.source=counter"
                )
            if world_size > 1:
                raise ConfigError(
                    "mask.source=reference is the stream of one process; set mask.source=counter to "
                    f"train with {world_size}"
                )
            self.reference = ReferenceMaskGenerators(cfg, fpcs, crop_size, patch_size, tubelet_size)
            return
        group_size = cfg.group_size or global_batch
        if cfg.truncate == "batch_min" and (global_batch % group_size or group_size % cfg.clips_per_mask):
            raise ConfigError(
                f"mask.group_size={group_size} does not divide the {global_batch} clips of a step"
                + (f" into groups of {cfg.clips_per_mask}, which share their masks" if cfg.clips_per_mask > 1 else "")
                + "; set mask.group_size to a divisor"
                + (f" that is a multiple of {cfg.clips_per_mask}" if cfg.clips_per_mask > 1 else "")
            )
        # Counted in masks, as all below.
        self.group_size = group_size // cfg.clips_per_mask
        cfg = cfg.model_copy(update={"group_size": self.group_size})
        self.samplers = [MaskSampler(cfg, grid, seed, group) for group, grid in enumerate(self.grids)]

    def __call__(
        self, step: int, sample_ids: Sequence[Tensor], group_ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> list[MaskBatch]:
        """Masks of one batch.

        Args:
            step: of the run.
            sample_ids: for each group present, int64 [B_g] on the host.
            group_ids: which groups these are.
            device: where the ids shall be.
        """
        if self.reference is not None:
            return [batch.to(device, non_blocking=True) for batch in self._from_reference(sample_ids, group_ids)]
        sample_ids = [ids // self.cfg.clips_per_mask for ids in sample_ids]
        members = self._members(sample_ids)
        groups = self.group_of(members * self.cfg.clips_per_mask)
        batches = []
        for ids, group in zip(sample_ids, group_ids, strict=True):
            batch = self.samplers[group](step, ids, device, members=members[groups == group])
            batches.append(replace(batch, mask_token=group))
        if self.cfg.truncate == "none":
            return self._weigh_all_tokens(batches, group_ids)
        return self._weigh_by_group(batches, sample_ids, group_ids, members, groups)

    def _members(self, sample_ids: Sequence[Tensor]) -> np.ndarray:
        own = np.unique(np.concatenate([ids.numpy() for ids in sample_ids]))
        if self.cfg.truncate == "none":
            return own
        return (np.unique(own // self.group_size)[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)

    def _weigh_by_group(
        self,
        batches: list[MaskBatch],
        sample_ids: Sequence[Tensor],
        group_ids: Sequence[int],
        members: np.ndarray,
        groups: np.ndarray,
    ) -> list[MaskBatch]:
        num_parts = self.global_batch // (self.group_size * self.cfg.clips_per_mask)
        parts = members // self.group_size
        present = {part: len(np.unique(groups[parts == part])) for part in np.unique(parts)}
        weighed = []
        for batch, ids, group in zip(batches, sample_ids, group_ids, strict=True):
            num_clips = {
                part: self.cfg.clips_per_mask * int(((parts == part) & (groups == group)).sum()) for part in present
            }
            own_parts = (ids.numpy() // self.group_size).tolist()
            # Every clip of a truncation group keeps the same number of tokens, so its length is the group's.
            weights = loss_weights.by_truncation_group(
                batch.target_lengths, batch.num_masks, own_parts, num_parts, present, num_clips
            )
            weighed.append(replace(batch, loss_weights=weights))
        return weighed

    def _weigh_all_tokens(self, batches: list[MaskBatch], group_ids: Sequence[int]) -> list[MaskBatch]:
        num_masks = len(self.cfg.masks)
        counts = torch.zeros(2, len(self.fpcs), num_masks, dtype=torch.int64)
        for batch, group in zip(batches, group_ids, strict=True):
            for kind, lengths in enumerate((batch.target_lengths, batch.context_lengths)):
                counts[kind, group] = torch.tensor(lengths).view(num_masks, -1).sum(1)
        if self.world_size > 1:
            assert self.sum_over_processes is not None
            self.sum_over_processes(counts)
        num_pairs = int((counts[0] > 0).sum())
        weighed = []
        for batch, group in zip(batches, group_ids, strict=True):
            target, context = (
                loss_weights.over_all_tokens(counts[kind, group], batch.batch_size, num_pairs) for kind in range(2)
            )
            weighed.append(replace(batch, loss_weights=target, context_loss_weights=context))
        return weighed

    def _from_reference(self, sample_ids: Sequence[Tensor], group_ids: Sequence[int]) -> list[MaskBatch]:
        assert self.reference is not None
        shared = self.cfg.clips_per_mask
        sizes = {self.fpcs[group]: len(ids) // shared for group, ids in zip(group_ids, sample_ids, strict=True)}
        drawn = self.reference(sizes, self.positions)
        batches = []
        for place, group in enumerate(group_ids):
            enc, pred = ([ids.repeat_interleave(shared, 0) for ids in lists] for lists in drawn[self.fpcs[group]])
            batch = MaskBatch.from_meta(enc, pred, grid=self.grids[group])
            weights = loss_weights.of_reference_batch(
                batch.target_lengths, batch.num_masks, len(group_ids), self.world_size
            )
            batches.append(replace(batch, loss_weights=weights, mask_token=place))
        return batches

    def state_dict(self) -> dict[str, object]:
        """Only the reference's stream has a state."""
        if self.reference is None:
            return {}
        calls = {fpc: own[0].num_calls for fpc, own in self.reference.generators.items()}
        return {"num_calls": calls, "positions": self.positions.get_state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Args: state: of state_dict; empty where a checkpoint has none."""
        if self.reference is None or not state:
            return
        calls, positions = state["num_calls"], state["positions"]
        assert isinstance(calls, dict) and isinstance(positions, Tensor)
        for fpc, generators in self.reference.generators.items():
            for generator in generators:
                generator.num_calls = calls[fpc]
        self.positions.set_state(positions)
