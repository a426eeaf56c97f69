"""V-JEPA 1's variance term: predictions of a clip shall differ from token to token, feature by feature.

For clip c and feature d, s_cd = mean over the masks of sqrt(var(z) + 1e-4), with the unbiased variance over the tokens
that this mask predicts of this clip, and loss = sum_c w_c * mean_d relu(1 - s_cd). With w_c = 1 / B this is the
reference's term (facebookresearch/jepa, app/vjepa/train.py:448-459), here in at least fp32, where the reference rounds
to autocast's dtype. A sequence of fewer than two tokens, whose variance the reference has as NaN, counts with 0.

Fused: the variance of all sequences in one reading of the predictions, in chunks of tokens that are merged in a fixed
order (Chan, Golub, LeVeque 1979), the same bits at every run; the gradient in another.

Bytes, with s the size of an element: forward K D s, backward 2 K D s; the statistics add 8 D bytes a chunk forward and
12 D a sequence. FLOPs: about 6 K D forward, 2 K D backward, so that memory bounds it.

Legend: K predicted tokens, D width, M masks, B clips, S = M B sequences, C chunks of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vjepa_fast.ops.packing import Packing, sequence_of_rows
from vjepa_fast.ops.triton_support.dispatch import jit, kernels_of, launch, rows_contiguous, tl, use_triton

EPS = 1e-4
"""Added to the variance before the root."""

_ROWS, _TILES, _COLS = 32, 4, 64
"""Tokens of a tile, tiles of a chunk, and features of a program."""


def variance_loss_ref(predictions: Tensor, packing: Packing, weights: Tensor) -> Tensor:
    """The definition, in at least fp32."""
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    variances = _variances_by_device(wide, packing) if packing.dynamic else _variances(wide, packing)
    std = (variances + EPS).sqrt()
    per_clip = std.view(-1, len(weights), wide.shape[-1]).mean(0)
    return ((1.0 - per_clip).relu().mean(-1) * weights.to(wide.dtype)).sum()


def _variances(x: Tensor, packing: Packing) -> Tensor:
    """[S, D], unbiased, over the tokens of each sequence."""
    variances = []
    parts = x[: packing.total].split([count * length for count, length in packing.runs])
    for part, (count, length) in zip(parts, packing.runs, strict=True):
        variances.append(part.view(count, length, -1).var(1) if length > 1 else x.new_zeros(count, x.shape[-1]))
    return torch.cat(variances)


def _variances_by_device(x: Tensor, packing: Packing) -> Tensor:
    """Variance of every sequence and feature, where only the device knows the lengths."""
    lengths = packing.cu_seqlens.diff()[:, None]
    # What lies behind is one sequence more, which is left out.
    sequence = sequence_of_rows(packing.cu_seqlens, len(x))
    nothing = x.new_zeros(len(lengths) + 1, x.shape[-1])
    mean = nothing.index_add(0, sequence, x)[:-1] / lengths.clamp_min(1)
    centred = x - F.pad(mean, (0, 0, 0, 1)).index_select(0, sequence)
    return nothing.index_add(0, sequence, centred.square())[:-1] / (lengths - 1).clamp_min(1)


@jit
def _place(num_chunks, width, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sequence, chunk and columns of a program; neighbours read neighbouring columns."""
    num_blocks = tl.cdiv(width, COLS)
    program = tl.program_id(0) // num_blocks
    cols = tl.program_id(0) % num_blocks * COLS + tl.arange(0, COLS)
    return (program // num_chunks).to(tl.int64), (program % num_chunks).to(tl.int64), cols


@jit
def _variance_loss_stats_kernel(  # type: ignore[no-untyped-def]
    predictions_ptr,  # [K, D], row stride predictions_stride
    cu_seqlens_ptr,  # int32 [S + 1]
    partial_ptr,  # fp32 [S, C, 2, D]: mean and sum of squared deviations
    predictions_stride,
    num_chunks,
    width,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COLS: tl.constexpr,
):
    sequence, chunk, cols = _place(num_chunks, width, COLS)
    first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64) + chunk * (ROWS * TILES)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    mean = tl.zeros((COLS,), tl.float32)
    squares = tl.zeros((COLS,), tl.float32)
    for tile in range(0, TILES):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        here = (rows < end)[:, None] & (cols < width)[None, :]
        x = tl.load(predictions_ptr + rows[:, None] * predictions_stride + cols[None, :], mask=here, other=0.0)
        x = x.to(tl.float32)
        # Empty tiles have weight 0.
        before = tl.maximum(tl.minimum(end - first, tile * ROWS), 0).to(tl.float32)
        count = tl.maximum(tl.minimum(end - first - tile * ROWS, ROWS), 0).to(tl.float32)
        tile_mean = tl.sum(x, 0) / tl.maximum(count, 1.0)
        centred = tl.where(here, x - tile_mean[None, :], 0.0)
        share = count / tl.maximum(before + count, 1.0)
        step = tile_mean - mean
        squares += tl.sum(centred * centred, 0) + step * step * before * share
        mean += step * share
    at = (sequence * num_chunks + chunk) * 2 * width + cols
    tl.store(partial_ptr + at, mean, mask=cols < width)
    tl.store(partial_ptr + at + width, squares, mask=cols < width)


@jit
def _variance_loss_fwd_kernel(  # type: ignore[no-untyped-def]
    cu_seqlens_ptr,  # int32 [S + 1]
    partial_ptr,  # fp32 [S, C, 2, D]
    weights_ptr,  # fp32 [B]
    losses_ptr,  # fp32 [B, column blocks]
    means_ptr,  # fp32 [S, D]
    scales_ptr,  # fp32 [S, D]: slope of s_cd over a deviation from the mean, times M
    slopes_ptr,  # fp32 [B, D]: slope of the loss over s_cd, over M
    num_masks,
    num_chunks,
    width,
    eps,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < width
    total_std = tl.zeros((COLS,), tl.float32)
    for mask in range(0, num_masks):
        sequence = mask * tl.num_programs(0) + clip
        length = tl.load(cu_seqlens_ptr + sequence + 1) - tl.load(cu_seqlens_ptr + sequence)
        mean = tl.zeros((COLS,), tl.float32)
        squares = tl.zeros((COLS,), tl.float32)
        for chunk in range(0, num_chunks):
            at = (sequence * num_chunks + chunk) * 2 * width + cols
            chunk_mean = tl.load(partial_ptr + at, mask=inside, other=0.0)
            chunk_squares = tl.load(partial_ptr + at + width, mask=inside, other=0.0)
            before = tl.minimum(length, chunk * CHUNK).to(tl.float32)
            count = tl.maximum(tl.minimum(length - chunk * CHUNK, CHUNK), 0).to(tl.float32)
            share = count / tl.maximum(before + count, 1.0)
            step = chunk_mean - mean
            squares += chunk_squares + step * step * before * share
            mean += step * share
        freedom = tl.maximum(length - 1, 1).to(tl.float32)
        std = tl.sqrt(squares / freedom + eps)
        tl.store(means_ptr + sequence * width + cols, mean, mask=inside)
        tl.store(scales_ptr + sequence * width + cols, 1.0 / (freedom * std), mask=inside)
        total_std += std
    # A NaN compares as neither and reaches the loss and the gradient.
    short = 1.0 - total_std / num_masks
    weight = tl.load(weights_ptr + clip) / width
    slope = tl.where(short <= 0.0, 0.0, -weight / num_masks)
    tl.store(slopes_ptr + clip * width + cols, slope, mask=inside)
    hinge = tl.where(inside, tl.where(short <= 0.0, 0.0, short), 0.0)
    tl.store(losses_ptr + clip * tl.num_programs(1) + tl.program_id(1), tl.sum(hinge, 0) * weight)


@jit
def _variance_loss_bwd_kernel(  # type: ignore[no-untyped-def]
    predictions_ptr,  # [K, D], row stride predictions_stride
    cu_seqlens_ptr,  # int32 [S + 1]
    means_ptr,  # fp32 [S, D]
    scales_ptr,  # fp32 [S, D]
    slopes_ptr,  # fp32 [B, D]
    grad_loss_ptr,  # scalar
    grad_ptr,  # [K, D]
    predictions_stride,
    num_rows,
    num_sequences,
    num_clips,
    num_chunks,
    width,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    sequence, chunk, cols = _place(num_chunks, width, COLS)
    inside = cols < width
    # What lies behind the last sequence counts as one more, of gradient 0.
    real = sequence < num_sequences
    first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=real, other=0).to(tl.int64)
    end = tl.where(real, end, num_rows)
    mean = tl.load(means_ptr + sequence * width + cols, mask=inside & real, other=0.0)
    scale = tl.load(scales_ptr + sequence * width + cols, mask=inside & real, other=0.0)
    scale *= tl.load(slopes_ptr + sequence % num_clips * width + cols, mask=inside & real, other=0.0)
    scale *= tl.load(grad_loss_ptr).to(tl.float32)
    # One pass for a sequence; the space behind may be longer than all chunks together.
    for start in range(first + chunk * CHUNK, end, num_chunks * CHUNK):
        for tile in range(0, CHUNK // ROWS):
            rows = start + tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            here = (rows < end)[:, None] & inside[None, :]
            x = tl.load(
                predictions_ptr + rows[:, None] * predictions_stride + cols[None, :], mask=here & real, other=0.0
            ).to(tl.float32)
            grad = tl.where(real, (x - mean[None, :]) * scale[None, :], 0.0)
            tl.store(grad_ptr + rows[:, None] * width + cols[None, :], grad.to(grad_ptr.dtype.element_ty), mask=here)


torch.library.define(
    "vjepa_fast::variance_loss_fwd",
    "(Tensor predictions, Tensor cu_seqlens, int max_seqlen, Tensor weights)"
    " -> (Tensor loss, Tensor means, Tensor scales, Tensor slopes)",
)
torch.library.define(
    "vjepa_fast::variance_loss_bwd",
    "(Tensor grad_loss, Tensor predictions, Tensor cu_seqlens, int max_seqlen, Tensor means, Tensor scales,"
    " Tensor slopes) -> Tensor grad",
)


@torch.library.register_fake("vjepa_fast::variance_loss_fwd")
def _fwd_outputs(
    predictions: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (), *[(len(cu_seqlens) - 1, predictions.shape[1])] * 2, (len(weights), predictions.shape[1])
    loss, means, scales, slopes = (
        torch.empty(shape, dtype=torch.float32, device=predictions.device) for shape in shapes
    )
    return loss, means, scales, slopes


@torch.library.register_fake("vjepa_fast::variance_loss_bwd")
def _bwd_output(
    grad_loss: Tensor,
    predictions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    means: Tensor,
    scales: Tensor,
    slopes: Tensor,
) -> Tensor:
    return torch.empty(predictions.shape, dtype=predictions.dtype, device=predictions.device)


def _num_chunks(max_seqlen: int) -> int:
    return max(1, -(-max_seqlen // (_ROWS * _TILES)))


def _variance_loss_fwd(
    predictions: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, means, scales, slopes = _fwd_outputs(predictions, cu_seqlens, max_seqlen, weights)
    num_sequences, width = means.shape
    num_clips, num_chunks, blocks = len(weights), _num_chunks(max_seqlen), -(-width // _COLS)
    predictions, cu_seqlens = rows_contiguous(predictions), cu_seqlens.contiguous()
    partial = torch.empty((num_sequences, num_chunks, 2, width), dtype=torch.float32, device=predictions.device)
    losses = torch.empty((num_clips, blocks), dtype=torch.float32, device=predictions.device)
    launch(
        _variance_loss_stats_kernel,
        (num_sequences * num_chunks * blocks,),
        predictions,
        cu_seqlens,
        partial,
        predictions.stride(0),
        num_chunks,
        width,
        ROWS=_ROWS,
        TILES=_TILES,
        COLS=_COLS,
        num_warps=4,
    )
    launch(
        _variance_loss_fwd_kernel,
        (num_clips, blocks),
        cu_seqlens,
        partial,
        weights.contiguous(),
        losses,
        means,
        scales,
        slopes,
        num_sequences // max(1, num_clips),
        num_chunks,
        width,
        EPS,
        CHUNK=_ROWS * _TILES,
        COLS=_COLS,
        num_warps=1,
    )
    return losses.sum(), means, scales, slopes


def _variance_loss_bwd(
    grad_loss: Tensor,
    predictions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    means: Tensor,
    scales: Tensor,
    slopes: Tensor,
) -> Tensor:
    grad = _bwd_output(grad_loss, predictions, cu_seqlens, max_seqlen, means, scales, slopes)
    (num_rows, width), num_sequences, num_chunks = predictions.shape, len(means), _num_chunks(max_seqlen)
    predictions = rows_contiguous(predictions)
    launch(
        _variance_loss_bwd_kernel,
        ((num_sequences + 1) * num_chunks * -(-width // _COLS),),
        predictions,
        cu_seqlens.contiguous(),
        means,
        scales,
        slopes,
        grad_loss,
        grad,
        predictions.stride(0),
        num_rows,
        num_sequences,
        len(slopes),
        num_chunks,
        width,
        CHUNK=_ROWS * _TILES,
        ROWS=_ROWS,
        COLS=_COLS,
        num_warps=4,
    )
    return grad


torch.library.impl("vjepa_fast::variance_loss_fwd", ("cpu", "cuda"), _variance_loss_fwd)
torch.library.impl("vjepa_fast::variance_loss_bwd", ("cpu", "cuda"), _variance_loss_bwd)
# Statistics, the loss of every clip, their sum.
kernels_of["variance_loss_fwd"] = 3


class _VarianceLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, predictions: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: Tensor
    ) -> Tensor:
        loss, *statistics = torch.ops.vjepa_fast.variance_loss_fwd(predictions, cu_seqlens, max_seqlen, weights)
        ctx.save_for_backward(predictions, cu_seqlens, *statistics)
        ctx.max_seqlen = max_seqlen
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):  # type: ignore[no-untyped-def]
        predictions, cu_seqlens, *statistics = ctx.saved_tensors
        grad = torch.ops.vjepa_fast.variance_loss_bwd(grad_loss, predictions, cu_seqlens, ctx.max_seqlen, *statistics)
        return grad, None, None, None


def variance_loss(predictions: Tensor, packing: Packing, weights: Tensor) -> Tensor:
    """Scalar, fp32, or fp64 if the predictions are.

    Args:
        predictions: [K, D], any float dtype; gets the gradient. Rows behind the last sequence count for nothing.
        packing: S = M * B sequences, mask by mask: sequence s is of clip s % B.
        weights: [B], any float dtype; 1 / B each for the reference's mean.

    Raises:
        ValueError: a number of sequences that is no multiple of the weights, or more tokens than predictions.
    """
    num_sequences, num_clips = len(packing.lengths), len(weights)
    if weights.ndim != 1 or num_clips == 0 or num_sequences == 0 or num_sequences % num_clips:
        raise ValueError(
            f"{num_sequences} sequences and weights of shape {list(weights.shape)}; expected [B], with M "
            "sequences for each of B clips"
        )
    if predictions.ndim != 2 or (packing.total > len(predictions) and not packing.dynamic):
        raise ValueError(
            f"predictions have shape {list(predictions.shape)}, the sequences {packing.total} tokens; "
            "expected [K, D] with a row for each token"
        )
    if use_triton(predictions):
        loss: Tensor = _VarianceLoss.apply(
            predictions, packing.cu_seqlens, packing.max_seqlen, weights.to(torch.float32)
        )
        return loss
    return variance_loss_ref(predictions, packing, weights)
