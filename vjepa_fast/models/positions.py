"""Position tables, fixed sines and cosines or learned, and their interpolation to other grids.

Formulas: facebookresearch/vjepa2, src/models/utils/pos_embs.py and src/models/vision_transformer.py:215-272.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_STD = 0.02
"""Of learned positions at the beginning."""


def _sincos(dim: int, positions: np.ndarray) -> np.ndarray:
    """[M, dim]: sines, then cosines, of positions * 10000 ** (-2 i / dim)."""
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = positions.reshape(-1)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_table(dim: int, grid: tuple[int, int, int], uniform_power: bool, video: bool = True) -> Tensor:
    """Position table of a grid.

    Args:
        dim: width of a token, a multiple of 4.
        grid: (T, H, W) in tokens.
        uniform_power: give the three axes equal widths; else time gets half, height and width a quarter each.
        video: false makes the 2-D table of an image model.

    Returns:
        fp32 [T * H * W, dim].
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides; got {dim}")
    t, h, w = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid), indexing="ij")
    if not video:
        parts = [_sincos(dim // 2, h), _sincos(dim // 2, w)]
    elif uniform_power:
        width = math.ceil(dim / 6) * 2
        parts = [_sincos(width, axis) for axis in (t, h, w)]
    else:
        parts = [_sincos(dim // 2, t), _sincos(dim // 4, h), _sincos(dim // 4, w)]
    return torch.from_numpy(np.concatenate(parts, axis=1)[:, :dim]).float()


def interpolation_scale(grid: tuple[int, int, int], patch_size: int) -> tuple[float, float, float]:
    """Factors of rotary positions with which rows and columns of any grid span those of a 256-pixel one.

    At patch size 14 it is one of 252 pixels (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1/models/utils/modules.py,
    RoPEAttention, interpolate_rope; the reference knows patch sizes 14 and 16 only).

    Args:
        grid: (T, H, W) in tokens.
        patch_size: pixels.
    """
    trained = (252 if patch_size == 14 else 256) // patch_size
    height, width = ((trained - 1) / (side - 1) if side > 1 else 1.0 for side in grid[1:])
    return 1.0, height, width


def interpolate_table(
    table: Tensor, trained: tuple[int, int, int], wanted: tuple[int, int, int], video: bool = True, cuts: bool = True
) -> Tensor:
    """The table of another grid.

    Fewer frames of the trained height and width take the first rows; anything else is interpolated, trilinearly for
    video and bicubically for images.

    Args:
        table: [T * H * W, D] of the trained grid.
        trained, wanted: (T, H, W) in tokens.
        cuts: False: fewer frames are interpolated too, as in V-JEPA 1 (facebookresearch/jepa,
            src/models/vision_transformer.py:199-234).

    Returns:
        [T' * H' * W', D] of the wanted grid.
    """
    if wanted == trained:
        return table
    if video and cuts and wanted[1:] == trained[1:] and wanted[0] < trained[0]:
        return table[: wanted[0] * wanted[1] * wanted[2]]
    dim = table.shape[-1]
    if video:
        scale = tuple(n / m for n, m in zip(wanted, trained, strict=True))
        volume = table.view(1, *trained, dim).permute(0, 4, 1, 2, 3)
        out = F.interpolate(volume, scale_factor=scale, mode="trilinear")
        return out.permute(0, 2, 3, 4, 1).reshape(-1, dim)
    image = table.view(1, trained[1], trained[2], dim).permute(0, 3, 1, 2)
    scale_2d = (wanted[1] / trained[1], wanted[2] / trained[2])
    return F.interpolate(image, scale_factor=scale_2d, mode="bicubic").permute(0, 2, 3, 1).reshape(-1, dim)


class SeparablePositions(nn.Module):
    """Learned positions that are a sum: one vector for each frame of tokens, one for each place in a frame.

    Args:
        dim: width of a token, D.
        grid: (T, H, W) in tokens.
    """

    def __init__(self, dim: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.temporal = nn.Parameter(torch.empty(1, grid[0], dim))
        self.spatial = nn.Parameter(torch.empty(1, grid[1] * grid[2], dim))
        for table in (self.temporal, self.spatial):
            nn.init.trunc_normal_(table, std=POSITION_STD)

    def forward(self) -> Tensor:
        """[T * H * W, D]."""
        return (self.temporal[0][:, None] + self.spatial[0][None]).flatten(0, 1)


def learned_table(dim: int, grid: tuple[int, int, int]) -> nn.Parameter:
    """[1, T * H * W, dim], one vector for each token."""
    table = nn.Parameter(torch.empty(1, math.prod(grid), dim))
    nn.init.trunc_normal_(table, std=POSITION_STD)
    return table


def add_positions(tokens: Tensor, table: Tensor, rows: Tensor | None) -> Tensor:
    """Tokens with the positions of a table that gets a gradient, the same bits at every run.

    Args:
        tokens: [K, D].
        table: [N, D]; taken in the dtype of the tokens.
        rows: int64 [K], clip * N + token id; None: all tokens of all clips in order.
    """
    table = table.to(tokens.dtype)
    if rows is None:
        return (tokens.view(-1, *table.shape) + table).flatten(0, 1)
    # Its backward adds up in a fixed order, that of index_select on a GPU does not.
    return tokens + F.embedding(rows % len(table), table)
