"""Counts the bytes that a network's blocks keep for the backward, and the temporary ones of a running block.

For each token of a block, with s bytes an element, D width and F hidden width. Our kernels keep the inputs of both
norms, of the four linear layers and of the activation, queries, keys, values, and the output of attention, 8 D s +
2 F s, with SwiGLU 8 D s + 3 F s; besides the statistics of norms and attention. Plain PyTorch on a CPU keeps what is
normed in fp32, the output of attention twice, and with SwiGLU silu's result.

Recomputed in full, a block keeps its input, D s; selectively also the results of products and attention, 6 D s + F s
(vjepa_fast/models/activation_checkpointing.py). Its backward then has the whole block for a moment.

A block that runs holds besides: what the block before gave, and the output of attention until it ends; the two widest
tensors of the MLP; on a CPU in half precision the products of RoPE in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from vjepa_fast.config.schema import Checkpointing
from vjepa_fast.cost.loads import Network


@dataclass(frozen=True)
class Tokens:
    """Token counts of a network's sequences."""

    all: float
    last: float | None = None
    """Of which the last block does what follows attention; None: of all."""

    def after_attention(self, is_last: bool) -> float:
        return self.all if self.last is None or not is_last else self.last


@dataclass(frozen=True)
class Stack:
    """Bytes of a stack of blocks; `stack_of` makes one."""

    width: int
    depth: int
    element: int
    levels: int
    checkpointing: Checkpointing
    before_attention: float
    """Kept, a token: the first norm, queries, keys and values."""
    attention: float
    """Kept, a token: what attention gives."""
    after_attention: float
    """Kept, a token: the second norm and the MLP."""
    rows: float
    """Kept, a token that goes on, where not all of them do."""
    kept_products: float
    """Kept selectively, a token: of what comes before and in attention, without the block's input."""
    kept_products_after: float
    """Kept selectively, a token: of what follows attention."""
    transient: float
    """While a block runs and nothing is kept, a token."""
    beside: float
    """While a block runs and everything is kept, a token."""
    transient_backward: float
    """In a block's backward, at the MLP, a token."""
    transient_attention: float
    """In a block's backward, before attention, a token, where what follows attention is gone."""
    embedding: float
    """Kept before the blocks, a token."""
    patches: float
    """While patches are embedded, a token."""
    norm: float
    """Kept by the norm behind the blocks, a token."""
    widest_weight: int
    """Elements of the largest weight, whose gradient is made beside where it is kept."""

    def whole_block(self, tokens: Tokens, index: int) -> float:
        """What a block keeps that is not recomputed."""
        is_last = index == self.depth - 1
        rows = tokens.after_attention(is_last)
        chosen = rows * self.rows if rows < tokens.all else 0.0
        return tokens.all * (self.before_attention + self.attention) + rows * self.after_attention + chosen

    def stored(self, tokens: Tokens, index: int) -> float:
        """What a block keeps from the forward to its backward."""
        if self.checkpointing == "none":
            return self.whole_block(tokens, index)
        size = tokens.all * self.width * self.element
        if self.checkpointing == "selective":
            rows = tokens.after_attention(index == self.depth - 1)
            size += tokens.all * self.kept_products + rows * self.kept_products_after
        return size

    def passing(self, tokens: float) -> float:
        """While a block runs of which nothing is kept."""
        return tokens * self.transient

    def forward(self, tokens: float) -> float:
        """While a block runs, beside what it keeps."""
        return tokens * (self.beside if self.checkpointing == "none" else self.transient)

    def backward(self, tokens: Tokens, index: int) -> float:
        """In the backward of a block, beside what it stored."""
        whole = self.whole_block(tokens, index)
        rows = tokens.after_attention(index == self.depth - 1)
        at_mlp = rows * self.transient_backward
        at_attention = tokens.all * self.transient_attention - rows * self.after_attention
        return whole - self.stored(tokens, index) + max(at_mlp, at_attention)

    def kept_before(self, tokens: float) -> float:
        """By the embedding of patches and by RoPE."""
        return tokens * self.embedding

    def kept_behind(self, tokens: Tokens) -> float:
        """By the norms behind the blocks."""
        return tokens.after_attention(True) * self.norm * self.levels

    def behind_backward(self, tokens: Tokens) -> float:
        """Gradients at the beginning of the backward and at the end: of the tokens' two forms."""
        return tokens.all * 2 * self.width * self.element


def stack_of(
    net: Network,
    s: int,
    kernels: bool,
    checkpointing: Checkpointing,
    *,
    levels: int = 1,
    pixels: float = 0.0,
    float8: bool = False,
) -> Stack:
    """The bytes of a network.

    Args:
        net: sizes.
        s: bytes of an element of the compute dtype.
        kernels: on our kernels; False: plain PyTorch on a CPU.
        checkpointing: of its blocks.
        levels: norms behind the blocks.
        pixels: uint8 values of a token, where it begins with patches.
        float8: its forward without a backward is in float8.
    """
    d, f = net.width * s, net.hidden * s
    wide = d if kernels else 4 * net.width
    lse, statistics = 4 * net.num_heads, 8
    # PyTorch's attention gives [S, H, L, D], which is then put in order.
    attention = d + lse + (0 if kernels else d)
    mlp = (3 if kernels else 4) * f if net.swiglu else 2 * f
    rotated = 2 * net.num_heads * net.rotated
    # Products of queries and keys with sines and cosines and their sum, in fp32, and the elements in another order.
    turning = 0.0 if kernels or s == 4 else rotated * (3 * 4 + s)
    # x and branch of the block before, x, the normed and the attended.
    passing = 5 * d + max(2 * f, (3 * d if not net.swiglu else 2 * d) + turning)
    if float8:
        # The operand in one byte; on a CPU it passes through fp32.
        passing = max(passing, 6 * d + f + net.hidden * (1 if kernels else 12))
    return Stack(
        width=net.width,
        depth=net.depth,
        element=s,
        levels=levels,
        checkpointing=checkpointing,
        before_attention=wide + statistics + d + 3 * d,
        attention=attention,
        after_attention=wide + statistics + d + mlp,
        rows=d,
        kept_products=3 * d + d + lse,
        kept_products_after=2 * d + (2 * f if net.swiglu else f),
        transient=passing,
        beside=2 * d + turning,
        transient_backward=d + f + (f if net.swiglu else 0),
        # The gradient of the tokens, that of queries, keys and values, and its copy to be rotated.
        transient_attention=d + 6 * d + turning + (2 * d if not kernels else 0),
        embedding=(8 if kernels else s * pixels) + (0 if kernels or s == 4 else 2 * 4 * net.rotated),
        # PyTorch gathers the patches, normalises them in fp32 and rounds.
        patches=d if kernels else d + pixels * (1 + 4 + (s if s < 4 else 0)),
        norm=wide + statistics + d,
        widest_weight=net.width * net.hidden,
    )
