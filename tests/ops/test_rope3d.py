"""Rotary positions against a plain reading of their definition."""

import pytest
import torch

from vjepa_fast.ops.rope3d import axis_width, rope3d, rope_tables, token_positions


def naive(x, position, style):
    """One head vector, one token at a time."""
    out = x.clone()
    d = axis_width(len(x))
    for axis in range(3):
        for j in range(d // 2):
            a, b = x[axis * d + 2 * j], x[axis * d + 2 * j + 1]
            indices = (j, j) if style == "interleaved" else ((2 * j) % (d // 2), (2 * j + 1) % (d // 2))
            angle_a, angle_b = (position[axis] * 10000.0 ** (-2 * i / d) for i in indices)
            out[axis * d + 2 * j] = a * torch.cos(angle_a) - b * torch.sin(angle_a)
            out[axis * d + 2 * j + 1] = b * torch.cos(angle_b) + a * torch.sin(angle_b)
    return out


@pytest.mark.parametrize("style", ["tiled", "interleaved"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 88, 96, 104])
def test_equals_its_definition(style, head_dim):
    torch.manual_seed(0)
    num_heads, ids = 2, torch.tensor([0, 5, 63, 17])
    positions = token_positions(ids, 3, 4)
    assert positions.tolist() == [[i // 12, i % 12 // 4, i % 4] for i in ids.tolist()]
    qkv = torch.randn(4, 3 * num_heads * head_dim, dtype=torch.float64)
    cos, sin = rope_tables(positions, head_dim, style, torch.float64)
    out = rope3d(qkv.clone(), cos, sin, num_heads).view(4, 3, num_heads, head_dim)
    for token in range(4):
        for part in range(3):
            for head in range(num_heads):
                x = qkv.view(4, 3, num_heads, head_dim)[token, part, head]
                expected = x if part == 2 else naive(x, positions[token].double(), style)
                torch.testing.assert_close(out[token, part, head], expected)


@pytest.mark.parametrize("style", ["tiled", "interleaved"])
def test_gradient(style):
    torch.manual_seed(0)
    qkv = torch.randn(5, 3 * 2 * 32, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_tables(token_positions(torch.arange(5) * 3, 2, 3), 32, style, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope3d(x * 1, cos, sin, 2), qkv)


def test_interleaved_scores_depend_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, dtype=torch.float64)

    def score(at_q, at_k):
        tables = rope_tables(torch.tensor([at_q, at_k]), 64, "interleaved", torch.float64)
        qkv = torch.stack([torch.cat([q, q, q]), torch.cat([k, k, k])])
        out = rope3d(qkv, *tables, 1).view(2, 3, 64)
        return out[0, 0] @ out[1, 1]

    torch.testing.assert_close(score([1, 2, 3], [4, 2, 0]), score([2, 5, 4], [5, 5, 1]))


def test_half_precision_is_within_one_unit_of_the_exact_result():
    torch.manual_seed(0)
    qkv = torch.randn(50, 3 * 64).bfloat16()
    cos, sin = rope_tables(token_positions(torch.arange(50), 5, 5), 64, "tiled", torch.float32)
    exact = rope3d(qkv.double(), cos.double(), sin.double(), 1)
    torch.testing.assert_close(rope3d(qkv.clone(), cos, sin, 1), exact.bfloat16(), atol=0, rtol=2**-7)
