"""Pixels as targets: what a masked autoencoder predicts, for the same encoder, predictor, masks and budget.

A target is a tubelet of raw pixels, each colour channel normalised by its own mean and deviation over the tubelet, as
in VideoMAE (Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
Pre-Training", NeurIPS 2022; MCG-NJU/VideoMAE, engine_for_pretraining.py, normlize_target). A channel is then what a
level of features is in V-JEPA 2.1, and the loss the same fused operator. Against VideoMAE's (x - mean) / (std + 1e-6)
the variance is that of a layer norm: over n and not n - 1 pixels, with 1e-5 added, for x from 0 to 1; so the noise of a
flat patch is not blown up.

Legend: B clips, T frames, L tokens, P = 3 * (pixels of a tubelet).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

CHANNELS = 3


def num_pixels(tubelet_size: int, patch_size: int) -> int:
    """P, what is predicted for a token."""
    return CHANNELS * tubelet_size * patch_size**2


def pixel_tubelets(clips: Sequence[Tensor], tubelet_size: int, patch_size: int) -> Tensor:
    """All tokens of all clips, fp32 [L, P] from 0 to 1, channel by channel, packed as features of an encoder are.

    Args:
        clips: for each group, uint8 [B, T, H, W, 3].

    Raises:
        ValueError: clips that are not raw pixels.
    """
    parts = []
    for group in clips:
        if group.dtype != torch.uint8:
            raise ValueError(
                f"clips are {group.dtype}; a model that predicts pixels (model.objective=pixels) is "
                "trained on raw uint8 clips"
            )
        parts.append(
            rearrange(group, "b (t a) (h p) (w q) c -> (b t h w) (c a p q)", a=tubelet_size, p=patch_size, q=patch_size)
        )
    return torch.cat(parts).float() / 255
