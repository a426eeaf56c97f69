"""The reference's own mask stream: same global seed, same index tensors.

Block sizes come from a generator seeded with a call counter, positions from torch's global generator (or one given),
in the order in which facebookresearch/vjepa2 draws them (src/masks/multiseq_multiblock3d.py). Use it to reproduce a
run of the reference's collator in one process; `vjepa_fast.masking.sampler` is the one to train with, because its masks
do not depend on who asked first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking.batch import Grid


def _uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + torch.rand(1, generator=generator).item() * (high - low)


class ReferenceMaskGenerator:
    """One mask of one frames-per-clip group."""

    def __init__(self, spec: MaskSpec, grid: Grid) -> None:
        self.spec = spec
        self.grid = grid
        self.max_context_frames = max(1, int(grid[0] * spec.max_temporal_keep))
        self.num_calls = 0

    def _block_size(self, seed: int) -> Grid:
        num_frames, height, width = self.grid
        generator = torch.Generator().manual_seed(seed)
        t = max(1, int(num_frames * _uniform(self.spec.temporal_scale, generator)))
        area = int(height * width * _uniform(self.spec.spatial_scale, generator))
        ratio = _uniform(self.spec.aspect_ratio, generator)
        return t, min(round(math.sqrt(area * ratio)), height), min(round(math.sqrt(area / ratio)), width)

    def _context(self, size: Grid, generator: torch.Generator | None) -> Tensor:
        (num_frames, height, width), (t, h, w) = self.grid, size
        context = torch.ones(self.grid, dtype=torch.bool)
        for _ in range(self.spec.num_blocks):
            top, left, start = (
                int(torch.randint(0, stop, (1,), generator=generator))
                for stop in (height - h + 1, width - w + 1, num_frames - t + 1)
            )
            context[start : start + t, top : top + h, left : left + w] = False
        if self.max_context_frames < num_frames:
            context[self.max_context_frames :] = False
        return context.flatten()

    def __call__(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Masks of a batch.

        Args:
            batch_size: clips.
            generator: source of the positions; None: torch's global generator.

        Returns:
            Context and target ids, int64 [B, K] and [B, K'], truncated to the shortest clip of the batch.
        """
        size = self._block_size(self.num_calls)
        self.num_calls += 1
        contexts = []
        for _ in range(batch_size):
            context = self._context(size, generator)
            # The reference draws without bound and would never end here.
            attempts = 1
            while not context.any():
                if attempts == 1000:
                    raise ConfigError(
                        f"blocks of {size} tokens leave no context on a grid of {self.grid} in 1000 "
                        "draws; use smaller masks (spatial_scale, temporal_scale, num_blocks)"
                    )
                context = self._context(size, generator)
                attempts += 1
            contexts.append(context)
        num_context = min(int(context.sum()) for context in contexts)
        num_target = min(int((~context).sum()) for context in contexts)
        if self.spec.max_keep is not None:
            num_context = min(num_context, self.spec.max_keep)
        context_ids = [context.nonzero().flatten()[:num_context] for context in contexts]
        target_ids = [(~context).nonzero().flatten()[:num_target] for context in contexts]
        if self.spec.full_complement:
            target_ids = [self._complement(ids) for ids in context_ids]
        elif self.spec.pred_full_complement:
            context_ids = [self._complement(ids) for ids in target_ids]
        result = torch.stack(context_ids), torch.stack(target_ids)
        return result[::-1] if self.spec.inv_block else result

    def _complement(self, ids: Tensor) -> Tensor:
        rest = torch.ones(self.grid, dtype=torch.bool).flatten()
        rest[ids] = False
        return rest.nonzero().flatten()


class ReferenceMaskGenerators:
    """All masks of all frames-per-clip groups, drawn in the reference's order."""

    def __init__(
        self, cfg: MaskConfig, fpcs: list[int], crop_size: tuple[int, int], patch_size: int, tubelet_size: int
    ) -> None:
        """Args: fpcs: frames per clip of each group; crop_size: pixels, (height, width)."""
        height, width = (side // patch_size for side in crop_size)
        self.generators = {
            fpc: [ReferenceMaskGenerator(spec, (max(1, fpc // tubelet_size), height, width)) for spec in cfg.masks]
            for fpc in dict.fromkeys(fpcs)
        }

    def step(self) -> None:
        """Advance the counters as one call would, as the reference does when it resumes."""
        for generators in self.generators.values():
            for generator in generators:
                generator.num_calls += 1

    def __call__(
        self, batch_sizes: dict[int, int], generator: torch.Generator | None = None
    ) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
        """Args: batch_sizes: clips of each group in this batch; groups without clips draw nothing.

        Returns:
            For each group present, (masks_enc, masks_pred) as MaskBatch.from_meta takes them.
        """
        result = {}
        for fpc, generators in self.generators.items():
            if batch_sizes.get(fpc, 0) > 0:
                pairs = [one(batch_sizes[fpc], generator) for one in generators]
                result[fpc] = ([enc for enc, _ in pairs], [pred for _, pred in pairs])
        return result
