"""Activation checkpointing: what a block keeps for the backward and what it recomputes.

`full` keeps the input of a block and runs all of it again. `selective` also keeps the results of matrix products and of
attention, and runs only what is between them again: norms, rotation, activations, additions. It works on operators as
they are called, so a block that is recomputed selectively runs eagerly (vjepa_fast.models.compiled_blocks).

Kept for the backward by a block of width 384 with an MLP of four times that, in multiples of its input, fp32 on a CPU
(tests/models/test_activation_checkpointing.py counts it): 18.0 without recomputation, 11.5 selectively, 1.5 in full;
SwiGLU 20.7, 12.8, 1.5. Half an input of each is the output of the last of the two blocks that were counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from vjepa_fast.config.schema import Checkpointing
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.rope3d import Rope

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm"})

_keeps_products: ContextVar[bool] = ContextVar("keeps_products", default=False)


def keeps_products() -> bool:
    """Whether the block that runs is recomputed selectively: what a product returns must then not be changed."""
    return _keeps_products.get()


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Back ends name their operators differently, but attention they all call by its name.
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    _, _, function = name.partition("::")
    kept = function.partition(".")[0] in _PRODUCTS or any(part in name for part in ("attention", "attn", "fmha"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


def _selective(block: nn.Module) -> Callable[..., Tensor]:
    def run(x: Tensor, packing: Packing, rope: Rope | None, *rows: Tensor) -> Tensor:
        token = _keeps_products.set(True)
        try:
            out: Tensor = block(x, packing, rope, *rows)
            return out
        finally:
            _keeps_products.reset(token)

    return run


def checkpoint(
    block: nn.Module, x: Tensor, packing: Packing, rope: Rope | None, kind: Checkpointing, *rows: Tensor
) -> Tensor:
    """block(x, packing, rope, *rows) with less kept for the backward.

    Args:
        block: takes [L, D] tokens, their packing and rotation, and returns one tensor.
        x, packing, rope: its arguments.
        kind: full or selective.
        rows: one more argument, or none.
    """
    out: Tensor
    # The state of a generator cannot be read while a CUDA graph is captured, and is of use to drop path only.
    draws = block.training and getattr(block, "drop_path_rate", 1.0) > 0
    if kind == "selective":
        out = torch_checkpoint(
            _selective(block),
            x,
            packing,
            rope,
            *rows,
            use_reentrant=False,
            preserve_rng_state=draws,
            context_fn=_contexts,
        )
    else:
        out = torch_checkpoint(block, x, packing, rope, *rows, use_reentrant=False, preserve_rng_state=draws)
    return out
