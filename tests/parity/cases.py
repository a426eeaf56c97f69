"""The training runs that are compared, defined by integers alone: sizes, weights, clips and masks.

Nothing here needs the reference. Every number comes from raw PCG64 words, whose stream numpy guarantees, so the golden
files can be checked on any machine and with any version of numpy and torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

OPTIMIZATION: dict[str, Any] = {
    # The warm-up ends within the three steps, so that both branches of the schedule run. Adam divides a gradient by
    # its own size, so rounding noise in elements that are nearly zero moves weights by a share of the learning rate;
    # at these rates the gradients of the later steps still agree to 1e-5 in fp32.
    "epochs": 3,
    "ipe": 2,
    "ipe_scale": 1.25,
    "warmup": 1,
    "start_lr": 2e-5,
    "lr": 2e-4,
    "final_lr": 1e-5,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "ema": (0.9, 1.0),
}


@dataclass(frozen=True)
class Case:
    """One tiny model and its batches; head dims are 16 so that RoPE turns 4 elements an axis and leaves 4."""

    name: str
    frames: tuple[int, ...] = (8,)
    use_rope: bool = True
    uniform_power: bool = False
    use_silu: bool = False
    use_pred_silu: bool = False
    wide_silu: bool = True
    loss_exp: float = 1.0
    seed: int = 0
    batch_size: int = 3
    crop_size: int = 32
    patch_size: int = 8
    tubelet_size: int = 2
    embed_dim: int = 48
    depth: int = 2
    num_heads: int = 3
    pred_embed_dim: int = 32
    pred_depth: int = 2
    pred_num_heads: int = 2
    num_masks: int = 2
    num_steps: int = 3

    @property
    def num_mask_tokens(self) -> int:
        return self.num_masks * len(self.frames)

    def grid(self, frames: int) -> tuple[int, int, int]:
        side = self.crop_size // self.patch_size
        return frames // self.tubelet_size, side, side

    def config(self, dtype: str = "float32") -> dict[str, Any]:
        """The same run as a dictionary for `vjepa_fast.config.Config.model_validate`."""
        return {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": self.embed_dim,
                "depth": self.depth,
                "num_heads": self.num_heads,
                "mlp_ratio": 4.0,
                "use_rope": self.use_rope,
                "uniform_power": self.uniform_power,
                "use_silu": self.use_silu,
                "use_pred_silu": self.use_pred_silu,
                "wide_silu": self.wide_silu,
                "pred_depth": self.pred_depth,
                "pred_embed_dim": self.pred_embed_dim,
                "pred_num_heads": self.pred_num_heads,
            },
            "mask": [{} for _ in range(self.num_masks)],
            "data": {
                "crop_size": self.crop_size,
                "patch_size": self.patch_size,
                "tubelet_size": self.tubelet_size,
                "dataset_fpcs": list(self.frames),
                "batch_size": self.batch_size,
            },
            "loss": {"loss_exp": self.loss_exp},
            "optimization": dict(OPTIMIZATION),
            "train": {"dtype": dtype},
        }


CASES = {
    case.name: case
    for case in (
        Case("rope"),
        Case("sincos", use_rope=False),
        Case("sincos_uniform", use_rope=False, uniform_power=True),
        Case("mixed_frames", frames=(8, 4)),
        Case("mixed_frames_sincos", frames=(8, 4), use_rope=False),
        Case("swiglu", use_silu=True, use_pred_silu=True),
        Case("swiglu_narrow_mse", use_silu=True, wide_silu=False, loss_exp=2.0),
    )
}


@dataclass
class Batch:
    """One step's input. Groups have one entry a frames-per-clip value.

    Attributes:
        clips: list over groups of uint8 [B, T, H, W, 3].
        masks_enc, masks_pred: list over groups of list over masks of int64 [B, K], ascending.
        grids: list over groups of (T, H, W) in tokens.
    """

    clips: list[torch.Tensor]
    masks_enc: list[list[torch.Tensor]]
    masks_pred: list[list[torch.Tensor]]
    grids: list[tuple[int, int, int]]


def raw_words(label: str, count: int) -> np.ndarray:
    """`count` uint64 words of PCG64 seeded with the CRC-32 of `label`."""
    return np.random.PCG64(zlib.crc32(label.encode())).random_raw(count)


def uniform(label: str, shape: Iterable[int]) -> torch.Tensor:
    """Uniform float64 numbers of mean 0 and variance 1."""
    shape = tuple(shape)
    unit = (raw_words(label, math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((2 * unit - 1) * math.sqrt(3.0)).reshape(shape)


def recipe_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """fp32 weights by name and shape: no bias, layer norm or mask token is trivial. Position tables are left out."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("pos_embed"):
            continue
        noise = uniform(f"{seed}/{name}", shape)
        if name.endswith("weight") and len(shape) > 1:
            noise = noise / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif "mask_tokens" in name:
            noise = 0.5 * noise
        else:
            noise = 0.1 * noise
        weights[name] = noise.float()
    return weights


def make_batch(case: Case, step: int) -> Batch:
    """Noise clips and disjoint random context and target tokens, different at every step."""
    batch = Batch([], [], [], [])
    for group, frames in enumerate(case.frames):
        label = f"{case.name}/{case.seed}/{step}/{group}"
        shape = (case.batch_size, frames, case.crop_size, case.crop_size, 3)
        pixels = (raw_words(f"{label}/clips", math.prod(shape)) >> np.uint64(56)).astype(np.uint8)
        batch.clips.append(torch.from_numpy(pixels.reshape(shape)))
        grid = case.grid(frames)
        batch.grids.append(grid)
        num_tokens = math.prod(grid)
        enc, pred = [], []
        for mask in range(case.num_masks):
            words = raw_words(f"{label}/mask{mask}", case.batch_size * num_tokens + 2)
            num_context = num_tokens // 8 + int(words[0] % np.uint64(num_tokens // 8))
            num_targets = num_tokens // 4 + int(words[1] % np.uint64(num_tokens // 4))
            order = torch.from_numpy(np.argsort(words[2:].reshape(case.batch_size, num_tokens), axis=1))
            enc.append(order[:, :num_context].sort(dim=1).values)
            pred.append(order[:, num_context : num_context + num_targets].sort(dim=1).values)
        batch.masks_enc.append(enc)
        batch.masks_pred.append(pred)
    return batch


def zero_gradient(name: str, case: Case, gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` without the entries that are exactly zero in exact arithmetic.

    A bias of the keys adds the same number to every score of a query, which the softmax ignores, unless RoPE turns
    the keys by their position. These are the middle third of qkv.bias; what is left there is rounding noise.
    """
    if not case.use_rope and name.endswith("attn.qkv.bias"):
        query, _, value = gradient.chunk(3)
        return torch.cat([query, value])
    return gradient


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()
