"""Transformer blocks over packed tokens; parameter names are Meta's.

Legend: L tokens of all sequences, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.models import compiled_blocks
from vjepa_fast.models.activation_checkpointing import Checkpointing, checkpoint, keeps_products
from vjepa_fast.ops.activation import gelu, swiglu
from vjepa_fast.ops.attention.op import attention
from vjepa_fast.ops.layer_norm import LayerNorm
from vjepa_fast.ops.linear import Linear
from vjepa_fast.ops.packing import Packing, sequence_of_rows
from vjepa_fast.ops.rope3d import Rope

INIT_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention within each sequence."""

    def __init__(self, dim: int, num_heads: int, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing, rope: Rope | None, rows: Tensor | None = None) -> Tensor:
        """[L, D], or [R, D] for `rows` int64 [R] of them."""
        qkv = self.qkv(x)
        if rope is not None:
            # Rotated in place, which must not happen to a product that is kept for the backward.
            qkv = rope(qkv.clone() if keeps_products() else qkv, self.num_heads)
        return self.proj(_select(attention(qkv, packing, self.num_heads, self.backend), rows))


def _select(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


class MLP(nn.Module):
    """Two linear layers with GELU (erf) between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """fc3(silu(fc1(x)) * fc2(x)); `wide` shrinks the hidden width to two thirds, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden: int, wide: bool) -> None:
        super().__init__()
        if wide:
            hidden = (int(2 * hidden / 3) + 7) // 8 * 8
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(dim, hidden)
        self.fc3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(swiglu(self.fc1(x), self.fc2(x)))


def drop_path_scale(packing: Packing, rate: float, length: int, like: Tensor, rows: Tensor | None = None) -> Tensor:
    """What drop path multiplies each token with: 0 for whole sequences with probability `rate`, else 1 / (1 - rate).

    Args:
        packing: of the tokens.
        rate: of sequences that are dropped.
        length: L.
        like: whose dtype and device the result has.
        rows: int64 [R]; None: all L tokens.

    Returns:
        [L, 1] or [R, 1].
    """
    keep = torch.empty(len(packing.lengths), device=like.device).bernoulli_(1 - rate) / (1 - rate)
    # Rows behind the last sequence are of one more that is always dropped.
    per_token = F.pad(keep, (0, 1)).index_select(0, _select(sequence_of_rows(packing.cu_seqlens, length), rows))
    return per_token[:, None].to(like.dtype)


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
        compiled: run the parts around attention compiled; see vjepa_fast.models.compiled_blocks. A block with hooks or
            foreign modules inside runs eagerly all the same.
        before: called before the weights are read, which may still be on their way from another process. A hook would
            do too, but blocks with hooks add up for themselves.
    """

    before: Callable[[], None] | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
        swiglu: bool,
        wide_swiglu: bool,
        attention: str = "auto",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.compiled = compiled
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp: nn.Module = SwiGLU(dim, hidden, wide_swiglu) if swiglu else MLP(dim, hidden)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        rope: Rope | None,
        rows: Tensor | None = None,
        branch: Tensor | None = None,
        defer: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output of the block, [L, D], or [R, D] with `rows`.

        Args:
            x: [L, D].
            packing: where the sequences lie.
            rope: rotates queries and keys; None: nothing does.
            rows: int64 [R], the tokens whose output is wanted; all L serve as keys and values, but what follows
                attention is done for these alone. None: all.
            branch: [L, D], what the block before left to be added to x.
            defer: leave the last addition to the norm that reads the output, which saves a pass over the tokens
                forward and two backward; the result is then (x, branch), whose sum is the output.
        """
        if self.before is not None:
            self.before()
        scales = self._drop_scales(x, packing, rows)
        if self.compiled and _may_compile(self, x, rows):
            x, branch = self._compiled_forward(x, packing, rope, branch, rows, scales)
        else:
            x, normed = (x, self.norm1(x)) if branch is None else self.norm1.add(x, branch)
            attended = self.attn(normed, packing, rope, rows)
            x, normed = self.norm2.add(_select(x, rows), attended if scales is None else attended * scales[0])
            branch = self.mlp(normed)
            if scales is not None:
                branch = branch * scales[1]
        return (x, branch) if defer else x + branch

    def _compiled_forward(
        self,
        x: Tensor,
        packing: Packing,
        rope: Rope | None,
        branch: Tensor | None,
        rows: Tensor | None,
        scales: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        x, qkv = compiled_blocks.before_attention(self, x, branch)
        if rope is not None:
            qkv = rope(qkv, self.attn.num_heads)
        attended = attention(qkv, packing, self.attn.num_heads, self.attn.backend)
        return compiled_blocks.after_attention(self, _select(x, rows), _select(attended, rows), scales)

    def _drop_scales(self, x: Tensor, packing: Packing, rows: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Of drop path for the two branches; None: nothing is dropped."""
        if not self.training or self.drop_path_rate == 0:
            return None
        first, second = (drop_path_scale(packing, self.drop_path_rate, len(x), x, rows) for _ in range(2))
        return first, second


def make_blocks(
    depth: int,
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path_rate: float,
    swiglu: bool,
    wide_swiglu: bool,
    attention: str = "auto",
    compiled: bool = False,
) -> nn.ModuleList:
    """`depth` blocks whose drop-path rate rises linearly from 0 to `drop_path_rate`; `attention` as in the config."""
    rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
    return nn.ModuleList(
        Block(dim, num_heads, mlp_ratio, rate, swiglu, wide_swiglu, attention, compiled) for rate in rates
    )


def set_compiled(module: nn.Module, compiled: bool) -> None:
    """Turn the compiled parts of all blocks within `module` on or off."""
    for child in module.modules():
        if isinstance(child, Block):
            child.compiled = compiled


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _may_defer(block: nn.Module) -> bool:
    """True if the block is one of ours and no hook sees its inputs or outputs."""
    ours = type(block).forward is Block.forward and "forward" not in vars(block)
    return (
        ours
        and not _is_looked_at(block)
        and not any(getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)
    )


def _is_looked_at(module: nn.Module) -> bool:
    """Whether hooks see what the module gets and returns. Those of FSDP2, which gather its parameters and free them,
    take that as it comes."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    return any(
        not type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp") for hook in hooks
    )


_BLOCK_MODULES = frozenset({Attention, MLP, SwiGLU, LayerNorm, Linear})


def _may_compile(block: Block, x: Tensor, rows: Tensor | None) -> bool:
    """True if the block has only our modules, no hooks, and a token count that compiled code serves.

    A block that is being traced, or recorded op by op for selective recomputation, is not compiled separately.
    """
    traced = torch.compiler.is_compiling() or keeps_products()
    if traced or len(x if rows is None else rows) < 2 or nn.modules.module._has_any_global_hook():
        return False
    inner = _inner(block)
    return _are_ours(inner) and not any(getattr(module, "float8", False) for module in inner)


def _inner(block: nn.Module) -> list[nn.Module]:
    return list(block.modules())[1:]


def _are_ours(modules: list[nn.Module]) -> bool:
    """True if these modules have no hooks and are as `Block` made them."""
    return all(
        type(module) in _BLOCK_MODULES
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in _HOOKS)
        for module in modules
    )


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    packing: Packing,
    rope: Rope | None,
    checkpointing: Checkpointing = "none",
    last_rows: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """After each block x and branch, whose sum is its output; the sum is x where branch is None.

    With `last_rows`, int64 [R], the last block yields these tokens only.

    A block's last addition is done by the first norm of the next. Recomputed blocks (see
    vjepa_fast.models.activation_checkpointing) add up for themselves, as their inputs are kept: one tensor rather than
    two. So do blocks with hooks, which see whole outputs.
    """
    branch: Tensor | None = None
    for block, following in zip_longest(blocks, blocks[1:]):
        rows = last_rows if following is None else None
        # What somebody looks at is computed for all tokens.
        inside = (rows,) if rows is not None and _may_defer(block) and _are_ours(_inner(block)) else ()
        outside = None if inside else rows
        if checkpointing != "none" and torch.is_grad_enabled():
            x = checkpoint(block, x, packing, rope, checkpointing, *inside)
        elif _may_defer(block):
            x, branch = block(x, packing, rope, *inside, branch=branch, defer=True)
            if outside is not None or (following is not None and not _may_defer(following)):
                x, branch = x + branch, None
        else:
            x = block(x, packing, rope)
        x = _select(x, outside)
        yield x, branch


def init_weights(module: nn.Module, blocks: nn.ModuleList, kind: str = "vjepa2") -> None:
    """The reference's initialisation.

    Weights of linear and convolution layers: normal with std 0.02, cut at +-2; biases 0; layer norms 1 and 0. Then the
    output projections of block i (counted from 1) are divided by sqrt(2 i). In SwiGLU blocks that scales fc2, which is
    an input projection there, as in the reference (facebookresearch/vjepa2, src/models/vision_transformer.py:147-153).
    The reference's own sampler turns about one draw in 2^24 into -2; torch's does not, so a seed gives other numbers.

    Args:
        module: all of it is initialised.
        blocks: those of its blocks.
        kind: `vjepa2`; `vjepa1`, whose training script draws all linear layers once more, so that nothing is divided
            (facebookresearch/jepa, app/vjepa/utils.py:127-140); or `xavier`, weights uniform within
            sqrt(6 / (inputs + outputs)) of 0, a patch of pixels counting as the inputs (Glorot and Bengio 2010); or
            `xavier_uniform` or `xavier_normal`, V-JEPA 2.1's init_type: as torch.nn.init has them, then divided.
    """
    for child in _post_order(module):
        if isinstance(child, nn.Linear | nn.Conv2d | nn.Conv3d):
            if kind == "xavier":
                # A convolution's own count of outputs includes the places of its kernel.
                nn.init.xavier_uniform_(child.weight.data.flatten(1))
            elif kind.startswith("xavier_"):
                getattr(nn.init, f"{kind}_")(child.weight)
            else:
                nn.init.trunc_normal_(child.weight, std=INIT_STD)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
    if kind in ("vjepa1", "xavier"):
        return
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2.0 * number))
            block.mlp.get_parameter("fc2.weight").div_(math.sqrt(2.0 * number))


def _post_order(module: nn.Module) -> list[nn.Module]:
    """All submodules, children before parents: the order in which nn.Module.apply visits them."""
    found: list[nn.Module] = []
    module.apply(found.append)
    return found
