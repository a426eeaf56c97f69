"""Tubelets of a clip to tokens: gather, normalise, project, for the kept tokens only.

A token is tubelet x patch x patch x 3 pixels (2 x 16 x 16 x 3 = 1536 values) times the kernel of a 3-D convolution
whose stride is its size, so it is a matrix product. Only tokens that are asked for are read: 1536 bytes a token from a
uint8 clip. FLOPs: 2 * K * tubelet * patch^2 * 3 * D.

Legend: B clips, T frames, H W pixels, K tokens asked for, D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vjepa_fast.ops.linear import linear

# ImageNet statistics, as the reference normalises clips (app/vjepa/transforms.py).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels [..., 3] to (x - 255 mean) / (255 std) in `dtype`."""
    mean = torch.tensor(MEAN, dtype=torch.float32, device=pixels.device) * 255.0
    std = torch.tensor(STD, dtype=torch.float32, device=pixels.device) * 255.0
    return pixels.to(dtype).sub_(mean.to(dtype)).div_(std.to(dtype))


def patch_embed(
    clips: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Tokens of clips.

    Args:
        clips: [B, T, H, W, 3]; uint8 is normalised here, a float clip is taken as normalised.
        weight: [D, 3, tubelet, patch, patch], the convolution kernel.
        bias: [D].
        rows: int64 [K], clip * tokens_per_clip + token id; None: all tokens of all clips in order.
        dtype: of the result.

    Returns:
        [K, D].
    """
    _, _, tubelet, patch, _ = weight.shape
    tubelets = rearrange(
        clips, "b (t pt) (h ph) (w pw) c -> b t h w pt ph pw c", pt=tubelet, ph=patch, pw=patch)
    if rows is None:
        pixels = tubelets.flatten(0, 3)
    else:
        _, num_frames, height, width = tubelets.shape[:4]
        index = torch.unravel_index(rows, (len(clips), num_frames, height, width))
        pixels = tubelets[index]
    wide = torch.promote_types(dtype, torch.float32)
    pixels = normalise(pixels, wide) if clips.dtype == torch.uint8 else pixels.to(wide)
    kernel = rearrange(weight, "d c pt ph pw -> d (pt ph pw c)")
    return linear(pixels.flatten(1).to(dtype), kernel, bias)
