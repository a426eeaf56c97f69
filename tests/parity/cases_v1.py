"""The training runs of V-JEPA 1 that are compared, defined by integers alone, as those of cases.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vjepa_fast.config.schema import Config
from vjepa_fast.masking.sampler import MaskSampler

from .cases import OPTIMIZATION, Batch, Case, make_batch, raw_words, uniform

# An epoch is one step and there is no warm-up, so that the first step is not clipped and the others are.
V1_OPTIMIZATION: dict[str, Any] = OPTIMIZATION | {"epochs": 6, "ipe": 1, "warmup": 0, "start_lr": 2e-4}


@dataclass(frozen=True)
class V1Case(Case):
    """V-JEPA 1's predictor has as many heads as its encoder. `batch_size` counts videos, `num_clips` clips of each."""

    use_rope: bool = False
    uniform_power: bool = True
    pred_embed_dim: int = 48
    pred_num_heads: int = 3
    num_clips: int = 1
    reg_coeff: float = 0.0
    clip_grad: float | None = None
    tube_ratio: float | None = None
    """None: random tokens as masks."""
    use_mask_tokens: bool = True

    def config(self, dtype: str = "float32") -> dict[str, Any]:
        """As of a Case."""
        config = super().config(dtype)
        config["model"] |= {
            "init": "vjepa1",
            "mask_token_by": "mask",
            "use_mask_tokens": self.use_mask_tokens,
            "num_mask_tokens": self.num_masks,
        }
        if self.tube_ratio is not None:
            tube = {"strategy": "tube", "ratio": self.tube_ratio, "round_context_down": True}
            config["mask"] = [tube] * self.num_masks
        config["data"] |= {"batch_size": self.batch_size * self.num_clips, "clips_per_video": self.num_clips}
        config["loss"] |= {"reg_coeff": self.reg_coeff}
        config["optimization"] = V1_OPTIMIZATION | {"clip_grad": self.clip_grad}
        return config


V1_CASES = {
    case.name: case
    for case in (
        V1Case("v1_two_clips", num_clips=2, reg_coeff=0.3, clip_grad=0.05),
        # Clips the predictor alone.
        V1Case("v1_tubes", seed=1, tube_ratio=0.6, clip_grad=0.5, uniform_power=False),
        V1Case("v1_noised", num_clips=2, reg_coeff=0.3, use_mask_tokens=False),
    )
}


def v1_batch(case: V1Case, step: int) -> Batch:
    """Clips in the reference's order, the first of every video, then the second; masks of videos, not repeated."""
    everything = make_batch(dataclasses.replace(case, batch_size=case.batch_size * case.num_clips), step)
    masks = make_batch(case, step)
    if case.tube_ratio is not None:
        sampler = MaskSampler(Config.model_validate(case.config()).mask, masks.grids[0], case.seed)
        enc, pred = sampler(step, range(case.batch_size)).to_meta()
        masks.masks_enc, masks.masks_pred = [enc], [pred]
    return Batch(everything.clips, masks.masks_enc, masks.masks_pred, masks.grids)


def repeated(case: V1Case, batch: Batch) -> Batch:
    """With the masks of a video for each of its clips."""
    enc, pred = (
        [[ids.repeat(case.num_clips, 1) for ids in masks] for masks in lists]
        for lists in (batch.masks_enc, batch.masks_pred)
    )
    return Batch(batch.clips, enc, pred, batch.grids)


def v1_noise(case: V1Case, step: int, mask: int, num_targets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a predictor without mask tokens draws for one mask: int64 [B] and fp32 [B, K', P].

    Low levels only, as the others leave nothing of the targets. The numbers need not be normal.
    """
    count = case.batch_size * case.num_clips
    levels = raw_words(f"{case.name}/{step}/{mask}/levels", count) % np.uint64(5)
    normal = uniform(f"{case.name}/{step}/{mask}/normal", (count, num_targets, case.pred_embed_dim))
    return torch.from_numpy(levels.astype(np.int64)), normal.float()
