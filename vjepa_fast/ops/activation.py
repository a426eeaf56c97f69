"""The activations of the MLP: GELU (erf form), and SwiGLU's silu(gate) * value with both gradients in one pass.

Fused: what PyTorch does for SwiGLU in two kernels forward and three backward, and the casts around fp32 arithmetic.
Only the operands are kept for the backward. A linear layer's bias stays in the epilogue of its product, where cuBLAS
adds it for nothing; a kernel that added it here would read and write just as many bytes.

Bytes, with s the size of an element: GELU forward 2 s n, backward 3 s n; SwiGLU forward 3 s n, backward 5 s n, where
PyTorch's kernels take 5 s n forward (the product reads what silu wrote) and 9 s n backward, and keep silu's result,
another s n. FLOPs: about 12 n (erf: 8) forward and 20 n backward, so that memory bounds it.

Within a compiled region the PyTorch lines stand, for which Inductor writes the same one-pass kernels and fuses more;
these serve eager mode.

Legend: n elements, L rows, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vjepa_fast.ops.triton_support.dispatch import jit, launch, rows_contiguous, tl, use_triton

_BLOCK = 1024
"""Elements of a program of four warps: each thread loads 16 bytes of bf16 at once."""


def gelu_ref(x: Tensor) -> Tensor:
    """x * Phi(x), with Phi the distribution function of the normal distribution."""
    return F.gelu(x)


def swiglu_ref(gate: Tensor, value: Tensor) -> Tensor:
    """The definition; half precision rounds silu(gate) before the product."""
    return F.silu(gate) * value


@jit
def _place(width, blocks_per_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row, first column and which elements of the block there are."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)
    return row, start + cols, cols < tl.minimum(width - start, BLOCK).to(tl.int32)


@jit
def _gelu_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [L, D], row stride x_stride
    y_ptr,  # [L, D], row stride y_stride
    x_stride,
    y_stride,
    width,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row, cols, inside = _place(width, blocks_per_row, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    # 1 / sqrt(2)
    y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _gelu_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_y_ptr,  # [L, D], row stride grad_stride
    x_ptr,  # [L, D], row stride x_stride
    grad_x_ptr,  # [L, D], row stride grad_stride
    x_stride,
    grad_stride,
    width,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row, cols, inside = _place(width, blocks_per_row, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row * grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
    # 1 / sqrt(2 pi)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    tl.store(grad_x_ptr + row * grad_stride + cols, (grad_y * slope).to(grad_x_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_fwd_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,  # [L, D], row stride gate_stride
    value_ptr,  # [L, D], row stride value_stride
    y_ptr,  # [L, D], row stride y_stride
    gate_stride,
    value_stride,
    y_stride,
    width,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row, cols, inside = _place(width, blocks_per_row, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * value_stride + cols, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * value
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_y_ptr,  # [L, D], row stride grad_stride
    gate_ptr,  # [L, D], row stride gate_stride
    value_ptr,  # [L, D], row stride value_stride
    grad_gate_ptr,  # [L, D], row stride grad_stride
    grad_value_ptr,  # [L, D], row stride grad_stride
    gate_stride,
    value_stride,
    grad_stride,
    width,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row, cols, inside = _place(width, blocks_per_row, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * value_stride + cols, mask=inside, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row * grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_value = grad_y * gate * sigmoid
    grad_gate = grad_y * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    at = row * grad_stride + cols
    tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_value_ptr + at, grad_value.to(grad_value_ptr.dtype.element_ty), mask=inside)


torch.library.define("vjepa_fast::gelu_fwd", "(Tensor x) -> Tensor y")
torch.library.define("vjepa_fast::gelu_bwd", "(Tensor grad_y, Tensor x) -> Tensor grad_x")
torch.library.define("vjepa_fast::swiglu_fwd", "(Tensor gate, Tensor value) -> Tensor y")
torch.library.define(
    "vjepa_fast::swiglu_bwd", "(Tensor grad_y, Tensor gate, Tensor value) -> (Tensor grad_gate, Tensor grad_value)"
)


@torch.library.register_fake("vjepa_fast::gelu_fwd")
def _gelu_fwd_output(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("vjepa_fast::gelu_bwd")
def _gelu_bwd_output(grad_y: Tensor, x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("vjepa_fast::swiglu_fwd")
def _swiglu_fwd_output(gate: Tensor, value: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.register_fake("vjepa_fast::swiglu_bwd")
def _swiglu_bwd_outputs(grad_y: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
    )


def _launch(kernel: object, dense: list[Tensor], inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Run an elementwise kernel(*dense, *inputs, *outputs, strides of the inputs, one stride of the rest, ...).

    Args:
        dense, outputs: contiguous.
        inputs: of any strides; rows that lie apart are read where they are.
    """
    count = outputs[0].numel()
    if count == 0:
        return
    if all(x.is_contiguous() for x in inputs):
        # One long row, whose strides are never used: zeros keep addresses known to be aligned.
        width, num_rows, strides = count, 1, [0] * (len(inputs) + 1)
    else:
        width = outputs[0].shape[-1]
        inputs = [rows_contiguous(x.reshape(-1, width)) for x in inputs]
        num_rows, strides = count // width, [*(x.stride(0) for x in inputs), width]
    blocks_per_row = -(-width // _BLOCK)
    launch(
        kernel,
        (num_rows * blocks_per_row,),
        *dense,
        *inputs,
        *outputs,
        *strides,
        width,
        blocks_per_row,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _gelu_fwd(x: Tensor) -> Tensor:
    y = _gelu_fwd_output(x)
    _launch(_gelu_fwd_kernel, [], [x], [y])
    return y


def _gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    grad_x = _gelu_bwd_output(grad_y, x)
    _launch(_gelu_bwd_kernel, [grad_y.contiguous()], [x], [grad_x])
    return grad_x


def _swiglu_fwd(gate: Tensor, value: Tensor) -> Tensor:
    y = _swiglu_fwd_output(gate, value)
    _launch(_swiglu_fwd_kernel, [], [gate, value], [y])
    return y


def _swiglu_bwd(grad_y: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    grads = _swiglu_bwd_outputs(grad_y, gate, value)
    _launch(_swiglu_bwd_kernel, [grad_y.contiguous()], [gate, value], list(grads))
    return grads


torch.library.impl("vjepa_fast::gelu_fwd", ("cpu", "cuda"), _gelu_fwd)
torch.library.impl("vjepa_fast::gelu_bwd", ("cpu", "cuda"), _gelu_bwd)
torch.library.impl("vjepa_fast::swiglu_fwd", ("cpu", "cuda"), _swiglu_fwd)
torch.library.impl("vjepa_fast::swiglu_bwd", ("cpu", "cuda"), _swiglu_bwd)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        y: Tensor = torch.ops.vjepa_fast.gelu_fwd(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        grad_x: Tensor = torch.ops.vjepa_fast.gelu_bwd(grad_y, *ctx.saved_tensors)
        return grad_x


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, value)
        y: Tensor = torch.ops.vjepa_fast.swiglu_fwd(gate, value)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        grads: tuple[Tensor, Tensor] = torch.ops.vjepa_fast.swiglu_bwd(grad_y, *ctx.saved_tensors)
        return grads


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), exactly (no tanh), as torch.nn.functional.gelu.

    Args:
        x: [..., D], any float dtype; the result has it too.
    """
    if use_triton(x) and not torch.compiler.is_compiling():
        y: Tensor = _Gelu.apply(x)
        return y
    return gelu_ref(x)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020, arXiv 2002.05202), in fp32 inside.

    Args:
        gate, value: [..., D], of one shape and dtype.

    Returns:
        [..., D] in their dtype.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != value.shape or gate.dtype != value.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)}, value {value.dtype} {list(value.shape)}; they must "
            "have one shape and dtype"
        )
    if use_triton(gate, value) and not torch.compiler.is_compiling():
        y: Tensor = _SwiGLU.apply(gate, value)
        return y
    return swiglu_ref(gate, value)
