"""Noised target features, an alternative to mask tokens in V-JEPA 1's predictor.

For each (mask, clip) sequence a level i of NUM_LEVELS is drawn, with a_i = product over j <= i of (1 - b_j) and b_j
rising evenly from 0.5 to 1. Its projected targets x become sqrt(a_i) norm(x) + sqrt(1 - a_i) e, where norm has no
parameters and e is normal noise (facebookresearch/jepa, src/models/predictor.py:154-172). As a_i halves with every
level, nearly all sequences are noise alone.

Legend: S sequences, K' target tokens of all sequences, P predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.ops.packing import Packing, sequence_of_rows

NUM_LEVELS = 1000
FIRST_BETA, LAST_BETA = 0.5, 1.0


@dataclass(frozen=True)
class Noise:
    """What was drawn for the targets of one frames-per-clip group."""

    levels: Tensor
    """int64 [S], each in [0, NUM_LEVELS)."""
    normal: Tensor
    """fp32 [K', P]."""

    @classmethod
    def draw(cls, packing: Packing, count: int, width: int, device: torch.device) -> Noise:
        """From torch's generator of the device.

        Args:
            packing: of the target tokens.
            count: K', with what lies behind the last sequence.
            width: P.
            device: of the tokens.
        """
        return cls(
            torch.randint(0, NUM_LEVELS, (len(packing.lengths),), device=device),
            torch.randn((count, width), device=device),
        )


def _kept(device: torch.device) -> Tensor:
    """fp32 [NUM_LEVELS]: a_i, worked out on the device."""
    levels = torch.arange(NUM_LEVELS, dtype=torch.float64, device=device)
    betas = FIRST_BETA + levels * (LAST_BETA - FIRST_BETA) / NUM_LEVELS
    return (1.0 - betas).cumprod(0).float()


def noised_targets(x: Tensor, packing: Packing, noise: Noise) -> Tensor:
    """Projected targets with noise, in at least fp32.

    Args:
        x: [K', P], the targets in the predictor's width; gets a gradient.
        packing: where its sequences lie.
        noise: of the same shapes.

    Returns:
        [K', P].
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    kept = _kept(x.device).index_select(0, noise.levels)
    # What lies behind the last sequence is of one more, that is never read.
    of_token = F.pad(kept, (0, 1)).index_select(0, sequence_of_rows(packing.cu_seqlens, len(x)))[:, None]
    return of_token.sqrt() * F.layer_norm(x, (x.shape[-1],)) + (1.0 - of_token).sqrt() * noise.normal
