"""Layer norm, optionally of a sum, with fp32 statistics and the cast to the next layer's dtype.

Fused: residual add, layer norm, affine parameters, output cast; the gradient of the sum is added in the backward.

Bytes of a row, with s the size of an element: forward s_x D (read) + s_out D (write), with a residual branch another
s_branch D (read) and s_sum D (write); backward s_out D + s_x D (read) + s_x D (write), with a residual another s_sum D
(read). FLOPs: about 8 D forward, 14 D backward, so that memory bounds it.

Rows are reduced within a program. The gradients of weight and bias are summed by a fixed number of programs over
consecutive rows, then over the programs: the same bits at every run.

Legend: L tokens, D width, P programs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vjepa_fast.ops.triton_support.dispatch import (
    MAX_ROW,
    jit,
    kernels_of,
    launch,
    num_multiprocessors,
    row_block,
    rows_contiguous,
    tl,
    use_triton,
)


def layer_norm_ref(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + branch, rounded to the wider dtype of the two, and its layer norm, computed in that of the parameters."""
    total = x if branch is None else x + branch
    wide = F.layer_norm(total.to(weight.dtype), (total.shape[-1],), weight, bias, eps)
    return total, wide.to(out_dtype)


@jit
def _layer_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [L, D], row stride x_stride
    branch_ptr,  # [L, D], row stride branch_stride; None without a residual
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    sum_ptr,  # [L, D]; None without a residual
    y_ptr,  # [L, D]
    mean_ptr,  # fp32 [L]
    rstd_ptr,  # fp32 [L]
    x_stride,
    branch_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        x += tl.load(branch_ptr + row * branch_stride + cols, mask=inside, other=0.0).to(tl.float32)
        # The norm is of the sum as it is stored, which is what the backward reads.
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + cols, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@jit
def _layer_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_y_ptr,  # [L, D]
    grad_sum_ptr,  # [L, D]; None where the sum is not used further
    x_ptr,  # [L, D] what was normed, row stride x_stride
    weight_ptr,  # [D]
    mean_ptr,  # fp32 [L]
    rstd_ptr,  # fp32 [L]
    grad_x_ptr,  # [L, D]
    grad_weight_ptr,  # fp32 [P, D] partial sums
    grad_bias_ptr,  # fp32 [P, D]
    x_stride,
    num_rows,
    width,
    rows_per_program,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, rows_per_program):
        row = program * rows_per_program + step
        here = inside & (row < num_rows)
        x = tl.load(x_ptr + row * x_stride + cols, mask=here, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * width + cols, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        normed = (x - mean) * rstd
        scaled = grad_y * weight
        along = tl.sum(scaled * normed, 0) / width
        level = tl.sum(scaled, 0) / width
        grad_x = (scaled - normed * along - level) * rstd
        if grad_sum_ptr is not None:
            grad_x += tl.load(grad_sum_ptr + row * width + cols, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * width + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=here)
        grad_weight += grad_y * normed
        grad_bias += grad_y
    tl.store(grad_weight_ptr + program * width + cols, grad_weight, mask=inside)
    tl.store(grad_bias_ptr + program * width + cols, grad_bias, mask=inside)


torch.library.define(
    "vjepa_fast::layer_norm_fwd",
    "(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, ScalarType out_dtype)"
    " -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "vjepa_fast::layer_norm_bwd",
    "(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake("vjepa_fast::layer_norm_fwd")
def _fwd_outputs(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (0,) if branch is None else tuple(x.shape)
    sum_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    return (
        torch.empty(shape, dtype=sum_dtype, device=x.device),
        torch.empty(x.shape, dtype=out_dtype, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
    )


@torch.library.register_fake("vjepa_fast::layer_norm_bwd")
def _bwd_outputs(
    grad_y: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device),
    )


def _layer_norm_fwd(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = total, y, mean, rstd = _fwd_outputs(x, branch, weight, bias, eps, out_dtype)
    x = rows_contiguous(x)
    if branch is not None:
        branch = rows_contiguous(branch)
    launch(
        _layer_norm_fwd_kernel,
        (x.shape[0],),
        x,
        branch,
        weight.contiguous(),
        bias.contiguous(),
        None if branch is None else total,
        y,
        mean,
        rstd,
        x.stride(0),
        0 if branch is None else branch.stride(0),
        x.shape[1],
        eps,
        **row_block(x.shape[1]),
    )
    return outputs


def _layer_norm_bwd(
    grad_y: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = x.shape
    per_program = -(-num_rows // (4 * num_multiprocessors(x.device))) or 1
    num_programs = -(-num_rows // per_program)
    partial = torch.empty((2, num_programs, width), dtype=torch.float32, device=x.device)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = rows_contiguous(x)
    launch(
        _layer_norm_bwd_kernel,
        (num_programs,),
        grad_y.contiguous(),
        None if grad_sum is None else grad_sum.contiguous(),
        x,
        weight.contiguous(),
        mean,
        rstd,
        grad_x,
        partial[0],
        partial[1],
        x.stride(0),
        num_rows,
        width,
        per_program,
        **row_block(width),
    )
    grad_weight, grad_bias = partial.sum(1).to(weight.dtype)
    return grad_x, grad_weight.clone(), grad_bias.clone()


torch.library.impl("vjepa_fast::layer_norm_fwd", ("cpu", "cuda"), _layer_norm_fwd)
torch.library.impl("vjepa_fast::layer_norm_bwd", ("cpu", "cuda"), _layer_norm_bwd)
# The sum of the partial sums, and a copy of each half.
kernels_of["layer_norm_bwd"] = 4


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, y, mean, rstd = torch.ops.vjepa_fast.layer_norm_fwd(x, branch, weight, bias, eps, out_dtype)
        ctx.has_branch = branch is not None
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype, bias.dtype
        ctx.save_for_backward(total if ctx.has_branch else x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor | None, grad_y: Tensor | None):  # type: ignore[no-untyped-def]
        normed, weight, mean, rstd = ctx.saved_tensors
        x_dtype, branch_dtype, bias_dtype = ctx.dtypes
        if grad_y is None:
            grad_y = torch.zeros_like(normed)
        if not ctx.has_branch:
            grad_sum = None
        grad, grad_weight, grad_bias = torch.ops.vjepa_fast.layer_norm_bwd(grad_y, grad_sum, normed, weight, mean, rstd)
        grad_branch = grad.to(branch_dtype) if ctx.has_branch else None
        return grad.to(x_dtype), grad_branch, grad_weight, grad_bias.to(bias_dtype), None, None


def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}; expected "
            "[..., D], [D], [D]"
        )
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"x has shape {list(x.shape)} but the branch {list(branch.shape)}; they must be equal")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Layer norm of the last dimension.

    Args:
        x: [..., D], any float dtype.
        weight, bias: [D], at least as wide as x.
        eps: added to the variance.
        out_dtype: of the result; None: that of x.

    Raises:
        ValueError: shapes that do not match.
    """
    _check(x, None, weight, bias)
    out_dtype = out_dtype or x.dtype
    if use_triton(x, weight, bias) and out_dtype != torch.float64 and x.shape[-1] <= MAX_ROW:
        y: Tensor = _LayerNorm.apply(x.reshape(-1, x.shape[-1]), None, weight, bias, eps, out_dtype)[1]
        return y.view(x.shape)
    return layer_norm_ref(x, None, weight, bias, eps, out_dtype)[1]


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x + branch and its layer norm.

    Args:
        x, branch: [..., D].
        weight, bias, eps: as layer_norm.
        out_dtype: of the norm; None: that of the sum.

    Returns:
        The sum, in the wider dtype of the two, and the norm.

    Raises:
        ValueError: shapes that do not match.
    """
    _check(x, branch, weight, bias)
    out_dtype = out_dtype or torch.promote_types(x.dtype, branch.dtype)
    if use_triton(x, branch, weight, bias) and out_dtype != torch.float64 and x.shape[-1] <= MAX_ROW:
        rows = (-1, x.shape[-1])
        total, y = _LayerNorm.apply(x.reshape(rows), branch.reshape(rows), weight, bias, eps, out_dtype)
        return total.view(x.shape), y.view(x.shape)
    return layer_norm_ref(x, branch, weight, bias, eps, out_dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that computes in the precision of its parameters and returns the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch and its norm; see add_layer_norm."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)
