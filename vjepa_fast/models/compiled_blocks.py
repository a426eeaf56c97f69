"""Compiles the parts of a block around attention, once for all layers of a width.

A block has two: what comes before attention (residual add, norm, qkv) and what comes after it (projection, residual
add, norm, MLP). RoPE and attention between them stay eager: they look at sequence lengths, which differ at each step.
The parts are pure functions of tensors, so that one compiled function serves every layer, and the number of tokens is
their only symbolic dimension: once each variant has been compiled, none is compiled again.

A variant is a set of widths and dtypes, gradients on or off, and with or without a branch and drop path: encoder,
target encoder and predictor make nine of them.

Norms by our kernels are opaque to the compiler. For activations, and where PyTorch serves, Inductor writes loops of its
own; on a CPU these are no faster than PyTorch's (docs/benchmarks.md).

Legend: L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vjepa_fast.common.errors import UserError
from vjepa_fast.ops.activation import gelu, swiglu
from vjepa_fast.ops.layer_norm import add_layer_norm, layer_norm
from vjepa_fast.ops.linear import Affine, linear_by
from vjepa_fast.ops.triton_support.dispatch import triton, use_triton


class Block(Protocol):
    """What is used of vjepa_fast.models.layers.Block, which stands on this module."""

    norm1: Any
    norm2: Any
    attn: Any
    mlp: Any


Norm = tuple[Tensor, Tensor, float]
"""Weight, bias and eps."""


def _norm_qkv(x: Tensor, norm: Norm, qkv: Affine) -> Tensor:
    return linear_by(layer_norm(x, *norm), qkv)


def _add_norm_qkv(x: Tensor, branch: Tensor, norm: Norm, qkv: Affine) -> tuple[Tensor, Tensor]:
    x, normed = add_layer_norm(x, branch, *norm)
    return x, linear_by(normed, qkv)


def _proj_norm_mlp(
    x: Tensor,
    attended: Tensor,
    scale: Tensor | None,
    mlp_scale: Tensor | None,
    proj: Affine,
    norm: Norm,
    mlp: tuple[Affine, ...],
) -> tuple[Tensor, Tensor]:
    """The scales [L, 1] are those of drop path, for the two branches; an MLP has two layers, SwiGLU three."""
    branch = linear_by(attended, proj)
    if scale is not None:
        branch = branch * scale
    x, normed = add_layer_norm(x, branch, *norm)
    hidden = [linear_by(normed, layer) for layer in mlp[:-1]]
    branch = linear_by(swiglu(*hidden) if len(hidden) == 2 else gelu(hidden[0]), mlp[-1])
    if mlp_scale is not None:
        branch = branch * mlp_scale
    return x, branch


class NotCompiled(UserError):
    """Blocks are to be compiled, and cannot be."""


_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}


def require_compiler(device: torch.device) -> None:
    """Raises NotCompiled where nothing can be compiled for the device."""
    hint = "or set model.compile_model=false"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise NotCompiled(
                "model.compile_model is set, but no C++ compiler was found, which compiling for a CPU "
                f"needs; install one (on Debian and Ubuntu: g++) or name it in CXX, {hint}"
            ) from error
    elif triton is None:
        raise NotCompiled(
            "model.compile_model is set, but Triton, which compiling for a GPU needs, is not installed; "
            f"install it, {hint}"
        )


def _call(
    function: Callable[..., Any], tokens: tuple[Tensor | None, ...], affine: Affine, *others: Any, variant: Any = None
) -> Any:
    """function(*tokens, *others) by the compiled variant for these operands.

    Args:
        function: one of the parts.
        tokens: its [L, ...] arguments, L at least 2; the first is not None.
        affine: one of its layers, which tells one width from another.
        others: its other arguments.
        variant: whatever else makes a variant.
    """
    first, weight = tokens[0], affine[0]
    assert first is not None
    key = (
        function,
        variant,
        tuple(weight.shape),
        weight.dtype,
        weight.requires_grad,
        first.dtype,
        first.device,
        first.requires_grad,
        torch.is_grad_enabled(),
        use_triton(first),
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        return compiled(*tokens, *others)
    require_compiler(first.device)
    # Importing it takes a second or two.
    from torch._dynamo.exc import BackendCompilerFailed

    # Compiled code is kept with the code object, whose number of versions is limited: each variant has its own.
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    for x in tokens:
        if x is not None:
            torch._dynamo.mark_dynamic(x, 0)
    try:
        # DistributedDataParallel has gradient buckets of its own; Dynamo would cut the graph along them.
        with torch._dynamo.config.patch(optimize_ddp=False):
            out = compiled(*tokens, *others)
    except BackendCompilerFailed as error:
        raise NotCompiled(
            f"model.compile_model is set, but the compiler failed; set model.compile_model=false to go "
            f"on without: {error}"
        ) from error
    _compiled[key] = compiled
    return out


def _norm_of(norm: nn.LayerNorm) -> Norm:
    return norm.weight, norm.bias, norm.eps


def before_attention(block: Block, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """x plus branch [L, D], and queries, keys and values [L, 3 D] of its norm."""
    qkv = block.attn.qkv.operands(x.dtype)
    norm = _norm_of(block.norm1)
    if branch is None:
        return x, _call(_norm_qkv, (x,), qkv, norm, qkv)
    out: tuple[Tensor, Tensor] = _call(_add_norm_qkv, (x, branch), qkv, norm, qkv)
    return out


def after_attention(
    block: Block, x: Tensor, attended: Tensor, scales: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """x and branch, whose sum is the output of the block.

    Args:
        block: whose weights are used.
        x, attended: [L, D].
        scales: [L, 1] factors of drop path for the two branches; None: no drop path.
    """
    names = ("fc1", "fc2", "fc3") if hasattr(block.mlp, "fc3") else ("fc1", "fc2")
    layers = [getattr(block.mlp, name) for name in names]
    proj = block.attn.proj.operands(attended.dtype)
    mlp = tuple(layer.operands(x.dtype) for layer in layers)
    out: tuple[Tensor, Tensor] = _call(
        _proj_norm_mlp,
        (x, attended, *(scales or (None, None))),
        proj,
        proj,
        _norm_of(block.norm2),
        mlp,
        variant=(scales is None, *(layer.weight.shape for layer in layers)),
    )
    return out
