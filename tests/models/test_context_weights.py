"""Distances to the nearest predicted token, against all pairs."""

from __future__ import annotations

import pytest
import torch

from vjepa_fast.models.context_weights import context_weights, squared_distances
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.rope3d import token_positions

GRIDS = [(1, 1, 1), (4, 6, 5), (1, 7, 7), (8, 3, 2)]


@pytest.mark.parametrize("grid", GRIDS)
def test_against_all_pairs(grid):
    g = torch.Generator().manual_seed(sum(grid))
    marked = torch.rand(5, *grid, generator=g) < 0.15
    marked[0] = False
    places = token_positions(torch.arange(marked[0].numel()), *grid[1:])
    apart = (places[:, None] - places).square().sum(-1).float()
    expected = torch.stack([torch.where(m.flatten(), apart, torch.inf).amin(-1).view(grid) for m in marked])
    assert torch.equal(squared_distances(marked), expected)
    assert squared_distances(marked)[0].isinf().all()


@pytest.mark.parametrize("padding", [0, 9])
def test_packed_sequences(padding):
    grid, lengths, targets = (2, 4, 4), (5, 1, 12), (3, 8, 0)
    g = torch.Generator().manual_seed(1)
    orders = [torch.randperm(32, generator=g) for _ in lengths]
    context = [order[:n].sort().values for order, n in zip(orders, lengths, strict=True)]
    target = [order[32 - n :].sort().values for order, n in zip(orders, targets, strict=True)]
    expected = []
    for some, others in zip(context, target, strict=True):
        pairs = torch.cdist(*(token_positions(ids, 4, 4).float() for ids in (some, others)))
        expected.append((pairs.amin(-1) / 2).sqrt().reciprocal() if len(others) else torch.zeros(len(some)))
    pad = torch.zeros(padding, dtype=torch.int32)
    found = context_weights(
        torch.cat([*context, pad]).int(),
        Packing(lengths, torch.tensor([0, 5, 6, 18], dtype=torch.int32)).cu_seqlens,
        torch.cat([*target, pad]).int(),
        torch.tensor([0, 3, 11, 11], dtype=torch.int32),
        grid,
        2.0,
    )
    torch.testing.assert_close(found[:18], torch.cat(expected))
    assert not found[:18].isnan().any()


def test_one_graph():
    ids, ends = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    compiled = torch.compile(context_weights, fullgraph=True, backend="eager")
    found = compiled(ids, ends, torch.tensor([1, 2]), ends, (1, 2, 2))
    assert torch.equal(found, torch.ones(2))
