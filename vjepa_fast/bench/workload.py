"""Workloads for benchmarks: model size, batch, and clips and masks as training draws them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vjepa_fast as vf
from vjepa_fast.config.schema import Config, DataConfig, Dtype
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.sizes import size_of


@dataclass(frozen=True)
class Workload:
    """A pretraining step of the V-JEPA 2 recipe: 16 frames unless said otherwise, tubelets of 2 x 16 x 16, predictor
    12 x 384 with 12 heads, an 8-block and a 2-block mask."""

    name: str
    model_name: str
    crop_size: int
    batch_size: int
    dtype: Dtype = "float32"
    num_frames: int = 16
    pred_depth: int = 12
    given: Config | None = None
    """The config itself, where it is not the one of this class."""

    @cached_property
    def config(self) -> Config:
        """As a recipe would give it, without activation checkpointing."""
        if self.given is not None:
            return self.given
        return Config.model_validate(
            {
                "model": {
                    "model_name": self.model_name,
                    "pred_depth": self.pred_depth,
                    "pred_num_heads": 12,
                    "uniform_power": True,
                },
                "data": {"crop_size": self.crop_size, "batch_size": self.batch_size, "dataset_fpcs": [self.num_frames]},
                "train": {"dtype": self.dtype},
            }
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a clip."""
        data = self.config.data
        height, width = (side // data.patch_size for side in data.crop_size)
        return self.num_frames // data.tubelet_size, height, width

    @property
    def width(self) -> int:
        return size_of(self.config.model).embed_dim

    @property
    def num_heads(self) -> int:
        return size_of(self.config.model).num_heads

    def clips(self, device: torch.device, seed: int = 0) -> Tensor:
        """uint8 [B, T, H, W, 3], noise."""
        shape = (self.batch_size, self.num_frames, *self.config.data.crop_size, 3)
        drawn = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        return drawn.to(device)

    @property
    def data(self) -> DataConfig:
        """How training would read this workload's batches, without the datasets."""
        own = self.config.data.model_dump(exclude={"datasets", "datasets_weights", "dataset_fpcs", "global_batch_size"})
        return DataConfig.model_validate({**own, "dataset_fpcs": [self.num_frames], "batch_size": self.batch_size})

    def as_dict(self) -> dict[str, Any]:
        """What a result says about it."""
        return {
            "name": self.name,
            "model": self.model_name,
            "crop_size": self.crop_size,
            "dtype": self.dtype,
            "num_frames": self.num_frames,
            "batch_size": self.batch_size,
            "pred_depth": self.pred_depth,
        }

    def masks(self, device: torch.device, step: int = 0) -> MaskBatch:
        """The masks of one step, by the rule and with the seed of the configuration."""
        sampler = vf.MaskSampler(self.config.mask, self.grid, self.config.train.seed)
        first = step * self.batch_size
        return sampler(step, np.arange(first, first + self.batch_size), device)

    def model(self, device: torch.device, seed: int = 0) -> vf.VJEPA:
        """Freshly initialised."""
        torch.manual_seed(seed)
        with device:
            return vf.VJEPA.from_config(self.config)


def of_config(name: str, cfg: Config) -> Workload:
    """The step of a config, with the clips of one process and of its longest frames-per-clip group.

    Args:
        name: what results call it.
        cfg: of the run.
    """
    data, model = cfg.data, cfg.model
    return Workload(
        name,
        model.model_name,
        data.crop_size[0],
        data.per_process(1),
        model.dtype,
        num_frames=max(data.dataset_fpcs),
        pred_depth=model.pred_depth,
        given=cfg,
    )


def fresh(masks: MaskBatch) -> MaskBatch:
    """The same masks without what an earlier step worked out and kept in them."""
    return replace(masks)


TINY = Workload("ViT-tiny 64 px", "vit_tiny", 64, 8, num_frames=8)
SMALL = Workload("ViT-S 128 px", "vit_small", 128, 4, num_frames=8)
BASE = Workload("ViT-B 224 px", "vit_base", 224, 2)
LARGE = Workload("ViT-L 256 px", "vit_large", 256, 24, "bfloat16")
FEW = Workload("ViT-B 224 px, 8 clips", "vit_base", 224, 8, "bfloat16")
"""So few that a GPU waits for launches."""

TRIAL = Workload("trial 32 px", "vit_tiny", 32, 2, num_frames=8, pred_depth=1)
"""Runs in no time; its figures mean nothing."""
