"""L_p distance of predictions to layer-normed features of the target encoder, with the gradient in the same pass.

h_i = norm(final_norm(features[rows_i])), where norm has no parameters, and
loss = sum_i w_i * mean_d |prediction_id - h_id|^p / p. With w_i = 1 / (pairs * tokens of the pair) this is the
reference's loss, the mean over the tokens and features of a (frames-per-clip group, mask) pair, then over the pairs
(facebookresearch/vjepa2, app/vjepa/train.py:432-450). No gradient reaches the target encoder.

V-JEPA 2.1 predicts the features of several depths side by side: a row then has G levels of D elements, each with norms
of its own, and the mean is over all of them (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1/train.py:591-681).

Fused: gather, both norms, distance, weighted mean, and the slope sign(d) |d|^(p-1) of every element, which the backward
multiplies by w_i / D and the incoming gradient in fp32. So nothing underflows in fp16 before a loss scale is applied.
For p = 1 a slope is one of -1, 0, 1 and takes a byte (2 stands for NaN, which must reach the gradient).

Bytes, with s the size of an element and t of a slope (1 for p = 1, else 4): forward K G D (s_prediction + s_feature +
t); backward K G D (t + s_prediction). FLOPs: about 16 K G D forward, K G D backward, so that memory bounds it.

Legend: L feature rows, K predicted tokens, G levels, D width of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vjepa_fast.ops.triton_support.dispatch import (
    MAX_ROW,
    jit,
    kernels_of,
    launch,
    row_block,
    rows_contiguous,
    tl,
    use_triton,
)

TARGET_EPS = 1e-5
"""eps of the parameter-free norm, PyTorch's default, which the reference leaves as it is."""

FinalNorm = tuple[Tensor, Tensor, float]
"""weight [G * D], bias [G * D] and eps of the target encoder's last layer norm, or of the last of each level."""


def target_features(features: Tensor, rows: Tensor | None, final_norm: FinalNorm | None, levels: int = 1) -> Tensor:
    """What is predicted, [K, G * D] in at least fp32; arguments as latent_loss."""
    if rows is not None:
        features = features.index_select(0, rows)
    targets = features.to(torch.promote_types(features.dtype, torch.float32)).unflatten(-1, (levels, -1))
    if final_norm is None:
        return F.layer_norm(targets, targets.shape[-1:], eps=TARGET_EPS).flatten(-2)
    weight, bias = (parameter.to(targets.dtype) for parameter in final_norm[:2])
    if levels == 1:
        targets = F.layer_norm(targets, targets.shape[-1:], weight, bias, final_norm[2])
    else:
        targets = F.layer_norm(targets, targets.shape[-1:], eps=final_norm[2])
        targets = targets * weight.view(levels, -1) + bias.view(levels, -1)
    return F.layer_norm(targets, targets.shape[-1:], eps=TARGET_EPS).flatten(-2)


def latent_loss_ref(
    predictions: Tensor,
    features: Tensor,
    weights: Tensor,
    exponent: float,
    rows: Tensor | None,
    final_norm: FinalNorm | None,
    levels: int = 1,
) -> Tensor:
    """The definition, in the dtype of target_features."""
    with torch.no_grad():
        targets = target_features(features, rows, final_norm, levels)
    distance = (predictions.to(targets.dtype) - targets).abs()
    if exponent != 1.0:
        distance = distance**exponent
    return (distance.mean(-1) * weights.to(targets.dtype)).sum() / exponent


@jit
def _latent_loss_fwd_kernel(  # type: ignore[no-untyped-def]
    predictions_ptr,  # [K, LEVELS, width], row stride predictions_stride
    features_ptr,  # [L, LEVELS, width], row stride features_stride
    rows_ptr,  # int64 [K]; None: row i of the features belongs to prediction i
    weights_ptr,  # fp32 [K]
    norm_weight_ptr,  # [LEVELS, width]; None without a final norm
    norm_bias_ptr,  # [LEVELS, width]; None without a final norm
    losses_ptr,  # fp32 [K, LEVELS]
    slopes_ptr,  # int8 or fp32 [K, LEVELS, width]
    predictions_stride,
    features_stride,
    width,
    norm_eps,
    target_eps,
    exponent,
    IS_L1: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    token = part // LEVELS
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    # Where the level begins within a row.
    begin = part % LEVELS * width
    row = token
    if rows_ptr is not None:
        row = tl.load(rows_ptr + token).to(tl.int64)
    target = tl.load(features_ptr + row * features_stride + begin + cols, mask=inside, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        target = tl.where(inside, target - tl.sum(target, 0) / width, 0.0)
        target *= 1.0 / tl.sqrt(tl.sum(target * target, 0) / width + norm_eps)
        target *= tl.load(norm_weight_ptr + begin + cols, mask=inside, other=0.0).to(tl.float32)
        target += tl.load(norm_bias_ptr + begin + cols, mask=inside, other=0.0).to(tl.float32)
    target = tl.where(inside, target - tl.sum(target, 0) / width, 0.0)
    target *= 1.0 / tl.sqrt(tl.sum(target * target, 0) / width + target_eps)

    place = predictions_ptr + token * predictions_stride + begin + cols
    difference = tl.load(place, mask=inside, other=0.0).to(tl.float32) - target
    distance = tl.abs(difference)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    if IS_L1:
        slope = tl.where(difference == difference, sign, 2.0)
    else:
        # log2 of 0 is never used; a NaN compares unequal to 0 and passes through.
        log = tl.log2(tl.where(distance == 0, 1.0, distance))
        slope = tl.where(distance == 0, 0.0, sign * tl.exp2((exponent - 1.0) * log))
        slope = tl.where(difference == difference, slope, difference)
        distance = tl.where(distance == 0, 0.0, tl.exp2(exponent * log))
    tl.store(slopes_ptr + part * width + cols, slope.to(slopes_ptr.dtype.element_ty), mask=inside)
    weight = tl.load(weights_ptr + token)
    tl.store(losses_ptr + part, tl.sum(distance, 0) / (width * LEVELS) * weight / exponent)


@jit
def _latent_loss_bwd_kernel(  # type: ignore[no-untyped-def]
    slopes_ptr,  # int8 or fp32 [K, LEVELS, width]
    weights_ptr,  # fp32 [K]
    grad_loss_ptr,  # scalar
    grad_ptr,  # [K, LEVELS, width]
    width,
    IS_L1: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    slope = tl.load(slopes_ptr + part * width + cols, mask=inside, other=0).to(tl.float32)
    if IS_L1:
        slope = tl.where(slope == 2.0, float("nan"), slope)
    scale = tl.load(weights_ptr + part // LEVELS) / (width * LEVELS) * tl.load(grad_loss_ptr).to(tl.float32)
    tl.store(grad_ptr + part * width + cols, (slope * scale).to(grad_ptr.dtype.element_ty), mask=inside)


torch.library.define(
    "vjepa_fast::latent_loss_fwd",
    "(Tensor predictions, Tensor features, Tensor? rows, Tensor weights, Tensor? norm_weight, Tensor? norm_bias,"
    " float norm_eps, float exponent, int levels) -> (Tensor loss, Tensor slopes)",
)
torch.library.define(
    "vjepa_fast::latent_loss_bwd",
    "(Tensor slopes, Tensor weights, Tensor grad_loss, ScalarType dtype, int levels) -> Tensor grad",
)


@torch.library.register_fake("vjepa_fast::latent_loss_fwd")
def _fwd_outputs(
    predictions: Tensor,
    features: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    exponent: float,
    levels: int,
) -> tuple[Tensor, Tensor]:
    slope_dtype = torch.int8 if exponent == 1.0 else torch.float32
    return (
        torch.empty((), dtype=torch.float32, device=predictions.device),
        torch.empty(predictions.shape, dtype=slope_dtype, device=predictions.device),
    )


@torch.library.register_fake("vjepa_fast::latent_loss_bwd")
def _bwd_output(slopes: Tensor, weights: Tensor, grad_loss: Tensor, dtype: torch.dtype, levels: int) -> Tensor:
    return torch.empty(slopes.shape, dtype=dtype, device=slopes.device)


def _latent_loss_fwd(
    predictions: Tensor,
    features: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    exponent: float,
    levels: int,
) -> tuple[Tensor, Tensor]:
    _, slopes = _fwd_outputs(predictions, features, rows, weights, norm_weight, norm_bias, norm_eps, exponent, levels)
    count, width = len(predictions), predictions.shape[1] // levels
    losses = torch.empty(count * levels, dtype=torch.float32, device=predictions.device)
    predictions, features = rows_contiguous(predictions), rows_contiguous(features)
    launch(
        _latent_loss_fwd_kernel,
        (count * levels,),
        predictions,
        features,
        None if rows is None else rows.contiguous(),
        weights.contiguous(),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        losses,
        slopes,
        predictions.stride(0),
        features.stride(0),
        width,
        norm_eps,
        TARGET_EPS,
        exponent,
        IS_L1=exponent == 1.0,
        LEVELS=levels,
        **row_block(width),
    )
    return losses.sum(), slopes


def _latent_loss_bwd(slopes: Tensor, weights: Tensor, grad_loss: Tensor, dtype: torch.dtype, levels: int) -> Tensor:
    grad = _bwd_output(slopes, weights, grad_loss, dtype, levels)
    count, width = len(slopes), slopes.shape[1] // levels
    launch(
        _latent_loss_bwd_kernel,
        (count * levels,),
        slopes,
        weights.contiguous(),
        grad_loss,
        grad,
        width,
        IS_L1=slopes.dtype == torch.int8,
        LEVELS=levels,
        **row_block(width),
    )
    return grad


torch.library.impl("vjepa_fast::latent_loss_fwd", ("cpu", "cuda"), _latent_loss_fwd)
torch.library.impl("vjepa_fast::latent_loss_bwd", ("cpu", "cuda"), _latent_loss_bwd)
# The last one adds up the rows.
kernels_of["latent_loss_fwd"] = 2


class _LatentLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        predictions: Tensor,
        features: Tensor,
        rows: Tensor | None,
        weights: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm_eps: float,
        exponent: float,
        levels: int,
    ) -> Tensor:
        loss, slopes = torch.ops.vjepa_fast.latent_loss_fwd(
            predictions, features, rows, weights, norm_weight, norm_bias, norm_eps, exponent, levels
        )
        ctx.save_for_backward(slopes, weights)
        ctx.options = predictions.dtype, levels
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):  # type: ignore[no-untyped-def]
        grad = torch.ops.vjepa_fast.latent_loss_bwd(*ctx.saved_tensors, grad_loss, *ctx.options)
        return grad, *[None] * 8


def latent_loss(
    predictions: Tensor,
    features: Tensor,
    weights: Tensor,
    exponent: float = 1.0,
    rows: Tensor | None = None,
    final_norm: FinalNorm | None = None,
    levels: int = 1,
) -> Tensor:
    """Scalar loss, fp32, or fp64 if the features are.

    Args:
        predictions: [K, G * D], any float dtype; the only operand that gets a gradient.
        features: [L, G * D], any float dtype; L = K where `rows` is None.
        weights: [K], any float dtype.
        exponent: p, positive.
        rows: int64 [K], which row of the features belongs to each prediction, all within 0 .. L - 1.
        final_norm: weight, bias and eps of a layer norm of the features that comes before the parameter-free one.
        levels: G; the norms are of each level by itself.

    Raises:
        ValueError: shapes that do not match, or an exponent that is not positive.
    """
    count, width = predictions.shape
    wanted = [features.shape[0] if rows is not None else count, width]
    if (
        list(features.shape) != wanted
        or list(weights.shape) != [count]
        or (rows is not None and list(rows.shape) != [count])
    ):
        raise ValueError(
            f"predictions have shape {[count, width]}, features {list(features.shape)}, weights {list(weights.shape)}, "
            f"rows {None if rows is None else list(rows.shape)}; expected [K, D], [L, D], [K], and [K] or None, with "
            "L = K without rows"
        )
    if levels < 1 or width % levels:
        raise ValueError(f"a width of {width} does not hold {levels} levels of equal width")
    if not exponent > 0:
        raise ValueError(f"exponent is {exponent}; expected a positive number")
    if use_triton(predictions, features) and width // levels <= MAX_ROW:
        weight, bias, eps = final_norm or (None, None, 0.0)
        loss: Tensor = _LatentLoss.apply(
            predictions,
            features.detach(),
            rows,
            weights.to(torch.float32),
            None if weight is None else weight.detach(),
            None if bias is None else bias.detach(),
            eps,
            float(exponent),
            levels,
        )
        return loss
    return latent_loss_ref(predictions, features, weights, exponent, rows, final_norm, levels)
