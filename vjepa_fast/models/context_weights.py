"""What context tokens weigh in V-JEPA 2.1's dense loss: less, the farther they are from what is predicted.

weight = 1 / sqrt(distance), where distance is that of the token to the nearest predicted token of its sequence, in
tokens along time, height and width (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1/models/utils/masks_dist.py).

Not pair by pair: predicted tokens are marked on a grid of each sequence, and the squared distance of every place to the
nearest mark is made one axis after another, as min over x' of f(x') + (x - x')^2 with f of the axes before. That is
S N (T + h + w) additions instead of S K K', and of shapes that do not depend on how many tokens a mask has, so a CUDA
graph replays it. Squared distances are whole numbers, so that nothing is rounded before the roots.

Legend: S sequences, (T, h, w) the grid, N = T h w its tokens, K context and K' predicted tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.ops.packing import sequence_of_rows
from vjepa_fast.ops.rope3d import Grid


def squared_distances(marked: Tensor) -> Tensor:
    """Squared Euclidean distance of every place to the nearest marked one; infinite where nothing is marked.

    Args:
        marked: bool [S, T, h, w].

    Returns:
        fp32 [S, T, h, w].
    """
    squares = torch.where(marked, 0.0, torch.inf)
    for axis in (1, 2, 3):
        places = torch.arange(squares.shape[axis], dtype=squares.dtype, device=squares.device)
        apart = (places[:, None] - places) ** 2
        squares = (squares.movedim(axis, -1)[..., None, :] + apart).amin(-1).movedim(-1, axis)
    return squares


def context_weights(
    context_ids: Tensor,
    context_cu_seqlens: Tensor,
    target_ids: Tensor,
    target_cu_seqlens: Tensor,
    grid: Grid,
    unit: float = 1.0,
) -> Tensor:
    """1 / sqrt(distance / unit) of every context token.

    Args:
        context_ids: integer [K_total], token ids of the sequences one after another; what lies behind the last
            sequence has some weight that means nothing.
        context_cu_seqlens: int32 [S + 1], where the sequences begin.
        target_ids, target_cu_seqlens: the same for the predicted tokens.
        grid: (T, h, w) in tokens.
        unit: tokens that count as a distance of 1.

    Returns:
        fp32 [K_total]; 0 for the tokens of a sequence without predicted tokens.
    """
    num_sequences, num_tokens = len(context_cu_seqlens) - 1, grid[0] * grid[1] * grid[2]
    # One sequence more, for what lies behind the last one.
    marked = torch.zeros((num_sequences + 1) * num_tokens, dtype=torch.bool, device=target_ids.device)
    rows = [
        sequence_of_rows(cu_seqlens, len(ids)) * num_tokens + ids
        for ids, cu_seqlens in ((target_ids, target_cu_seqlens), (context_ids, context_cu_seqlens))
    ]
    marked.index_fill_(0, rows[0], True)
    marked[num_sequences * num_tokens :] = False
    squares = squared_distances(marked.view(-1, *grid)).flatten()
    # Rounded as there: root, division, root, division.
    distances = squares.index_select(0, rows[1]).sqrt() * (1.0 / unit)
    return distances.sqrt().reciprocal()
