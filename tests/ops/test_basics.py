"""Attention, patch embedding and packing against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from vjepa_fast.ops.attention.op import attention
from vjepa_fast.ops.packing import Packing, concatenate, permute_rows
from vjepa_fast.ops.patch_embed import MEAN, STD, patch_embed


def pack(lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return Packing(tuple(lengths), cu)


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (3, 3, 7, 1, 1, 2), (1, 2, 3, 5, 7, 11)])
def test_attention_stays_within_sequences(lengths):
    torch.manual_seed(0)
    packing, heads, dim = pack(lengths), 2, 8
    qkv = torch.randn(sum(lengths), 3 * heads * dim, dtype=torch.float64, requires_grad=True)
    out = attention(qkv, packing, heads)
    expected = []
    for part in qkv.split(list(lengths)):
        q, k, v = part.view(-1, 3, heads, dim).permute(1, 2, 0, 3)
        expected.append(((q @ k.mT * dim**-0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(out, torch.cat(expected))
    weight = torch.randn_like(out)
    (ours,) = torch.autograd.grad((out * weight).sum(), qkv, retain_graph=True)
    (oracle,) = torch.autograd.grad((torch.cat(expected) * weight).sum(), qkv)
    torch.testing.assert_close(ours, oracle)


def test_runs_and_concatenation():
    whole = concatenate([pack((3, 3, 2)), pack((2, 5))])
    assert whole.lengths == (3, 3, 2, 2, 5) and whole.cu_seqlens.tolist() == [0, 3, 6, 8, 10, 15]
    assert whole.runs == ((2, 3), (2, 2), (1, 5)) and whole.max_seqlen == 5 and whole.total == 15


def test_permute_rows_gradient():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(permute_rows(x, order, order.argsort()), x[order])
    assert torch.autograd.gradcheck(lambda y: permute_rows(y, order, order.argsort()), x)


@pytest.mark.parametrize("tubelet, patch", [(2, 16), (2, 8), (1, 4), (4, 5)])
def test_patch_embed_is_a_strided_convolution_of_the_kept_tokens(tubelet, patch):
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (2, 2 * tubelet, 3 * patch, 2 * patch, 3), dtype=torch.uint8)
    weight = torch.randn(7, 3, tubelet, patch, patch, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    pixels = (clips.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    dense = F.conv3d(pixels.movedim(-1, 1), weight, bias, stride=(tubelet, patch, patch)).flatten(2).mT.reshape(-1, 7)
    for rows in (None, torch.tensor([23, 0, 7, 7])):
        out = patch_embed(clips, weight, bias, rows, torch.float64)
        expected = dense if rows is None else dense[rows]
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-6)
        for ours, oracle in zip(
            *(torch.autograd.grad(x.square().sum(), (weight, bias), retain_graph=True) for x in (out, expected)),
            strict=True,
        ):
            torch.testing.assert_close(ours, oracle, atol=1e-2, rtol=1e-6)
    floats = patch_embed(pixels, weight, bias, None, torch.float64)
    torch.testing.assert_close(floats, dense, atol=1e-9, rtol=1e-9)
