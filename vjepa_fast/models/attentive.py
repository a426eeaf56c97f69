"""Attentive probe: self-attention blocks, cross-attention with one learned query, a linear layer.

Parameter names and sizes are those of facebookresearch/vjepa2, src/models/attentive_pooler.py. Epsilons are 1e-5.

Legend: B clips, N tokens of a clip, D width, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.models.layers import INIT_STD, MLP, Block, init_weights
from vjepa_fast.ops.layer_norm import LayerNorm
from vjepa_fast.ops.linear import Linear
from vjepa_fast.ops.packing import Packing

EPS = 1e-5


class CrossAttention(nn.Module):
    """Attention of a few queries to all tokens, without a projection of the output."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """[B, Q, D] from queries [B, Q, D] and x [B, N, D]."""
        q = self.q(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttentionBlock(nn.Module):
    """A transformer block whose queries are not normed."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.xattn = CrossAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """[B, Q, D] from queries [B, Q, D] and x [B, N, D]."""
        queries = queries + self.xattn(queries, self.norm1(x))
        return queries + self.mlp(self.norm2(queries))


class AttentivePooler(nn.Module):
    """One vector a clip.

    Args:
        dim: D.
        num_heads: of every attention.
        depth: blocks, the last of which is the cross-attention.
    """

    def __init__(self, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, 1, dim))
        self.cross_attention_block = CrossAttentionBlock(dim, num_heads)
        self.blocks = (
            nn.ModuleList(Block(dim, num_heads, 4.0, 0.0, False, False) for _ in range(depth - 1))
            if depth > 1
            else None
        )
        for block in self.blocks or ():
            assert isinstance(block, Block)
            block.norm1.eps = block.norm2.eps = EPS
        nn.init.trunc_normal_(self.query_tokens, std=INIT_STD)
        init_weights(self, self.blocks or nn.ModuleList())
        with torch.no_grad():
            self.cross_attention_block.mlp.fc2.weight.div_(math.sqrt(2.0 * max(1, depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] from features [B, N, D]."""
        batch_size, num_tokens, dim = x.shape
        if self.blocks is not None:
            packing, flat = Packing.uniform(batch_size, num_tokens, x.device), x.reshape(-1, dim)
            for block in self.blocks:
                flat = block(flat, packing, None)
            x = flat.view(x.shape)
        pooled: Tensor = self.cross_attention_block(self.query_tokens.expand(batch_size, -1, -1), x)
        return pooled[:, 0]


class AttentiveClassifier(nn.Module):
    """Class scores out of frozen features.

    Args:
        dim: D, the encoder's width.
        num_heads: of every attention; the reference's evaluations have 16 whatever the encoder's number is.
        num_classes: C.
        depth: blocks of the pooler.

    Raises:
        ConfigError: the heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, num_classes: int, depth: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"a probe of width {dim} cannot have {num_heads} heads; expected a divisor")
        self.pooler = AttentivePooler(dim, num_heads, depth)
        # With torch's own initialisation, as in the reference.
        self.linear = Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] from features [B, N, D]."""
        scores: Tensor = self.linear(self.pooler(x))
        return scores
