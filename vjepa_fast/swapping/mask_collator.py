"""The reference's mask collators on our sampler: same constructor, same output.

    facebookresearch/vjepa2  src/masks/multiseq_multiblock3d.py  MaskCollator(cfgs_mask, dataset_fpcs, crop_size=...)
    facebookresearch/jepa    src/masks/multiblock3d.py           MaskCollator(cfgs_mask, crop_size=..., num_frames=...)
    facebookresearch/jepa    src/masks/random_tube.py            the same, with masks that have a `ratio`

Both are called with keywords, as Meta's scripts do.

Random numbers differ. The reference draws sizes of blocks from a generator seeded with a shared call counter, and their
places from whatever generator the calling worker has: all ranks see the same sizes, ranks that were seeded alike the
same masks, and which worker asks first decides. Here a mask is a function of (seed, number of the call, place in the
batch), and ranks differ. `source="reference"` draws as the reference does, to the bit in one process.

Legend: B clips, K context tokens, K' target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.messages import explain
from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking.batch import Grid
from vjepa_fast.masking.reference import ReferenceMaskGenerator
from vjepa_fast.masking.sampler import MaskSampler

Pair = tuple[list[Tensor], list[Tensor]]
Size = int | Sequence[int]

_BLOCKS = ("spatial_scale", "temporal_scale", "aspect_ratio", "num_blocks")
_OPTIONAL = ("max_temporal_keep", "max_keep", "full_complement", "pred_full_complement", "inv_block")


class MaskCollator:
    """`collate_fn` of a DataLoader that adds masks to a batch.

    Args:
        cfgs_mask: one dictionary a mask, as in Meta's YAML: spatial_scale, temporal_scale, aspect_ratio and num_blocks,
            or `ratio` alone for tubes. Keys that the reference does not read are passed over.
        dataset_fpcs: frames per clip that occur; None: V-JEPA 1's collator, for num_frames.
        crop_size, patch_size: pixels, (height, width) or one number.
        tubelet_size: frames of a token.
        num_frames: of every clip, in V-JEPA 1's collator.
        source: `counter`, or `reference` for the reference's own random numbers.
        seed: of the masks; None: the rank of this process, 0 where nothing is distributed.

    Raises:
        ConfigError: masks that make no sense.
    """

    def __init__(
        self,
        cfgs_mask: Sequence[Mapping[str, Any]],
        dataset_fpcs: Sequence[int] | None = None,
        crop_size: Size = (224, 224),
        patch_size: Size = (16, 16),
        tubelet_size: int = 2,
        num_frames: int = 16,
        *,
        source: Literal["counter", "reference"] = "counter",
        seed: int | None = None,
    ) -> None:
        self.grouped = dataset_fpcs is not None
        fpcs = list(dict.fromkeys(dataset_fpcs)) if dataset_fpcs is not None else [num_frames]
        (height, width), (patch_height, patch_width) = _pair(crop_size), _pair(patch_size)
        masks = MaskConfig(masks=[_spec(cfg, number) for number, cfg in enumerate(cfgs_mask)], source="counter")
        if seed is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            seed = torch.distributed.get_rank() if distributed else 0
        self.groups = {
            fpc: _Group(
                masks, (max(1, fpc // tubelet_size), height // patch_height, width // patch_width), source, seed, number
            )
            for number, fpc in enumerate(fpcs)
        }

    def step(self) -> None:
        """Pass over one call, as a run does that goes on."""
        for group in self.groups.values():
            group.next_step()

    def __call__(self, batch: Sequence[Any]) -> Any:
        """Collate samples and draw masks for them.

        Args:
            batch: samples; of V-JEPA 2 (buffer, label, clip_indices), of which the last tells the frames per clip.

        Returns:
            (collated batch, masks_enc, masks_pred), the masks as lists of int64 [B, K] and [B, K'] on the CPU; of
            V-JEPA 2 a list of these, one a frames-per-clip group that the batch has.

        Raises:
            ValueError: a clip of another length than dataset_fpcs.
        """
        if not self.grouped:
            [group] = self.groups.values()
            return torch.utils.data.default_collate(list(batch)), *group(len(batch))
        samples: dict[int, list[Any]] = {fpc: [] for fpc in self.groups}
        for sample in batch:
            fpc = len(sample[-1][-1])
            if fpc not in samples:
                raise ValueError(f"a clip has {fpc} frames; dataset_fpcs has {', '.join(map(str, samples))}")
            samples[fpc].append(sample)
        return [
            (torch.utils.data.default_collate(own), *self.groups[fpc](len(own))) for fpc, own in samples.items() if own
        ]


class _Group:
    """All masks of clips of one length. Worker processes share the number of calls."""

    def __init__(self, masks: MaskConfig, grid: Grid, source: str, seed: int, number: int) -> None:
        self.masks, self.grid, self.source = masks, grid, source
        self.sampler = MaskSampler(masks, grid, seed, number)
        # Of this context it can be shared with workers that are forked as well.
        self.calls = get_context("spawn").Value("q", 0)

    def next_step(self) -> int:
        with self.calls.get_lock():
            self.calls.value += 1
            return int(self.calls.value) - 1

    def __call__(self, batch_size: int) -> Pair:
        step = self.next_step()
        if self.source == "counter":
            return self.sampler(step, np.arange(batch_size)).to_meta()
        pairs = [self._as_reference(spec, batch_size, step) for spec in self.masks.masks]
        return [context for context, _ in pairs], [target for _, target in pairs]

    def _as_reference(self, spec: MaskSpec, batch_size: int, step: int) -> tuple[Tensor, Tensor]:
        if spec.strategy == "tube":
            return self._tubes(spec.ratio, batch_size)
        generator = ReferenceMaskGenerator(spec, self.grid)
        generator.num_calls = step
        return generator(batch_size)

    def _tubes(self, ratio: float, batch_size: int) -> tuple[Tensor, Tensor]:
        """From numpy's global generator (src/masks/random_tube.py, sample_mask)."""
        num_frames, height, width = self.grid
        places = height * width
        kept = int(places * (1.0 - ratio))
        context = []
        for _ in range(batch_size):
            seen = np.arange(places) >= places - kept
            np.random.shuffle(seen)
            context.append(np.tile(seen, num_frames))
        dense = torch.from_numpy(np.stack(context))
        return tuple(mask.nonzero()[:, 1].view(batch_size, -1) for mask in (dense, ~dense))  # type: ignore[return-value]


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    first, second = size
    return first, second


def _spec(cfg: Mapping[str, Any], number: int) -> MaskSpec:
    """Of one of cfgs_mask.

    Raises:
        ConfigError: a key that is missing or a value that makes no sense.
    """
    if cfg.get("ratio") is not None and cfg.get("spatial_scale") is None:
        options = {"strategy": "tube", "ratio": cfg["ratio"], "round_context_down": True}
    else:
        missing = [name for name in _BLOCKS if cfg.get(name) is None]
        if missing:
            raise ConfigError(
                f"cfgs_mask[{number}] has no {' and no '.join(missing)}; expected {', '.join(_BLOCKS)}, "
                "or `ratio` alone for tubes"
            )
        options = {name: cfg[name] for name in (*_BLOCKS, *_OPTIONAL) if cfg.get(name) is not None}
    try:
        return MaskSpec.model_validate(options)
    except ValidationError as error:
        raise ConfigError(explain(error, f"cfgs_mask[{number}]", {})) from error
