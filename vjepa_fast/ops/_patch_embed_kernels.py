"""The kernels of patch_embed.py, which says what they do and has the legend: fold, forward, backward, unfold."""

from __future__ import annotations

from vjepa_fast.ops.triton_support.dispatch import jit, tl


@jit
def _channel(index, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channel of a pixel value of a token, and where the weight [3, tubelet, patch, patch] has it."""
    if CHANNELS_LAST:
        channel = index % 3
        place = channel * (PIXELS // 3) + index // 3
    else:
        channel = index // (PIXELS // 3)
        place = index
    return channel, place


@jit
def _pixel_offset(  # type: ignore[no-untyped-def]
    index,
    stride_t,
    stride_h,
    stride_w,
    stride_c,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Elements from the first pixel value of a token to another."""
    if CHANNELS_LAST:
        line = index // (3 * PATCH)
        within = (index % (3 * PATCH)).to(tl.int64)
    else:
        line = (index // PATCH) % (TUBELET * PATCH)
        channel = (index // (TUBELET * PATCH * PATCH)).to(tl.int64)
        within = channel * stride_c + (index % PATCH).to(tl.int64) * stride_w
    return (line // PATCH).to(tl.int64) * stride_t + (line % PATCH).to(tl.int64) * stride_h + within


@jit
def _token_start(  # type: ignore[no-untyped-def]
    place, stride_b, stride_t, stride_h, stride_w, TUBELET: tl.constexpr, PATCH: tl.constexpr
):
    """Elements from the first pixel value of all to that of a token, given its (clip, t, h, w) in 16 bits each."""
    t, h, w = (place >> 32) & 0xFFFF, (place >> 16) & 0xFFFF, place & 0xFFFF
    return (place >> 48) * stride_b + t * TUBELET * stride_t + h * PATCH * stride_h + w * PATCH * stride_w


@jit
def _patch_embed_fold_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # [D, 3, tubelet, patch, patch]
    bias_ptr,  # [D]
    folded_ptr,  # [D, P]
    folded_bias_ptr,  # fp32 [D]
    width,
    scale_0,  # of each channel's weights
    scale_1,
    scale_2,
    offset_0,  # of each channel's pixels
    offset_1,
    offset_2,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < width
    level = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        here = inside[:, None] & (index < PIXELS)[None, :]
        channel, place = _channel(index, PIXELS, CHANNELS_LAST)
        weight = tl.load(weight_ptr + d[:, None] * PIXELS + place[None, :], mask=here, other=0.0).to(tl.float32)
        scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
        offset = tl.where(channel == 0, offset_0, tl.where(channel == 1, offset_1, offset_2))
        folded = (weight * scale[None, :]).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + d[:, None] * PIXELS + index[None, :], folded, mask=here)
        level += tl.sum(folded.to(tl.float32) * offset[None, :], 1)
    bias = tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(folded_bias_ptr + d, bias + level, mask=inside)


@jit
def _add_product(sums, lost, left, right):  # type: ignore[no-untyped-def]
    """sums + left @ right, and what rounding has taken from it so far.

    In fp32 one long chain of additions would be less exact than PyTorch's product, which adds up shorter ones; so each
    product is added with the error of the addition kept (Kahan). Where operands are rounded, that would show nothing.
    """
    if left.dtype == tl.float32:
        product = tl.dot(left, right, input_precision="ieee")
        total = sums + product
        return total, lost + ((sums - total) + product)
    return tl.dot(left, right, sums), lost


@jit
def _patch_embed_fwd_kernel(  # type: ignore[no-untyped-def]
    clips_ptr,  # [B, T, H, W, 3]
    rows_ptr,  # int64 [K]; None: all tokens of all clips
    weight_ptr,  # [D, P] folded
    bias_ptr,  # fp32 [D] folded
    table_ptr,  # [N, D]; None without positions
    tokens_ptr,  # [K, D]
    places_ptr,  # int64 [K]: (clip, t, h, w) of each token in 16 bits each
    stride_b,
    stride_t,
    stride_h,
    stride_w,
    stride_c,
    count,
    width,
    num_tokens,
    tokens_h,
    tokens_w,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PIXELS: tl.constexpr = 3 * TUBELET * PATCH * PATCH
    # Programs of the same tokens run next to each other, so that the pixels come out of the cache.
    program = tl.program_id(0)
    num_blocks = tl.cdiv(width, BLOCK_N)
    block = program % num_blocks
    token = (program // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # A row behind the last reads token 0 and is not stored.
    inside_m, inside_n = token < count, cols < width
    row = tl.where(inside_m, token, 0)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + token, mask=inside_m, other=0).to(tl.int64)
    clip = row // num_tokens
    number = (row - clip * num_tokens).to(tl.int32)
    line = number // tokens_w
    t, h, w = line // tokens_h, line % tokens_h, number % tokens_w
    place = (clip << 48) | (t.to(tl.int64) << 32) | (h.to(tl.int64) << 16) | w.to(tl.int64)
    if block == 0:
        tl.store(places_ptr + token, place, mask=inside_m)
    start = _token_start(place, stride_b, stride_t, stride_h, stride_w, TUBELET, PATCH)

    # Bias and positions come first: behind the product they would need registers that the sums fill.
    here = inside_m[:, None] & inside_n[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias_ptr + cols, mask=inside_n, other=0.0)[None, :]
    if table_ptr is not None:
        table_ptrs = table_ptr + number.to(tl.int64)[:, None] * width + cols[None, :]
        sums += tl.load(table_ptrs, mask=here, other=0.0).to(tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, PIXELS, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        offset = _pixel_offset(index, stride_t, stride_h, stride_w, stride_c, TUBELET, PATCH, CHANNELS_LAST)
        pixel_ptrs = clips_ptr + start[:, None] + offset[None, :]
        weight_ptrs = weight_ptr + cols[None, :] * PIXELS + index[:, None]
        if PIXELS % BLOCK_K == 0:
            pixels = tl.load(pixel_ptrs).to(tl.float32)
            weight = tl.load(weight_ptrs, mask=inside_n[None, :], other=0.0)
        else:
            pixels = tl.load(pixel_ptrs, mask=(index < PIXELS)[None, :], other=0).to(tl.float32)
            weight = tl.load(weight_ptrs, mask=inside_n[None, :] & (index < PIXELS)[:, None], other=0.0)
        if CENTRE:
            pixels = (pixels - 128.0) * 0.015625
        sums, lost = _add_product(sums, lost, pixels.to(weight.dtype), weight)
    sums = (sums + lost).to(tokens_ptr.dtype.element_ty)
    tl.store(tokens_ptr + token[:, None] * width + cols[None, :], sums, mask=here)


@jit
def _patch_embed_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [K, D]
    clips_ptr,  # [B, T, H, W, 3]
    places_ptr,  # int64 [K], as the forward wrote them
    partial_ptr,  # fp32 [S, D, P]
    stride_b,
    stride_t,
    stride_h,
    stride_w,
    stride_c,
    count,
    width,
    tokens_per_range,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    PIXELS: tl.constexpr = 3 * TUBELET * PATCH * PATCH
    program, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_blocks = tl.cdiv(width, BLOCK_D)
    d = (program % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = (program // num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside_d, inside_p = d < width, index < PIXELS
    offset = _pixel_offset(index, stride_t, stride_h, stride_w, stride_c, TUBELET, PATCH, CHANNELS_LAST)
    sums = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    lost = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    for first in range(0, tokens_per_range, BLOCK_T):
        token = part * tokens_per_range + first + tl.arange(0, BLOCK_T)
        inside = token < count
        place = tl.load(places_ptr + token, mask=inside, other=0)
        start = _token_start(place, stride_b, stride_t, stride_h, stride_w, TUBELET, PATCH)
        grad = tl.load(
            grad_ptr + token[:, None] * width + d[None, :], mask=inside[:, None] & inside_d[None, :], other=0.0
        )
        pixels = tl.load(
            clips_ptr + start[:, None] + offset[None, :], mask=inside[:, None] & inside_p[None, :], other=0
        ).to(tl.float32)
        if CENTRE:
            pixels = (pixels - 128.0) * 0.015625
        sums, lost = _add_product(sums, lost, tl.trans(grad), pixels.to(grad.dtype))
    tl.store(
        partial_ptr + (part * width + d[:, None]) * PIXELS + index[None, :],
        sums + lost,
        mask=inside_d[:, None] & inside_p[None, :],
    )


@jit
def _patch_embed_unfold_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # fp32 [S, D, P]
    grad_bias_ptr,  # fp32 [D]
    grad_weight_ptr,  # [D, 3, tubelet, patch, patch]
    num_ranges,
    width,
    scale_0,
    scale_1,
    scale_2,
    offset_0,
    offset_1,
    offset_2,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    here = (d < width)[:, None] & (index < PIXELS)[None, :]
    sums = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    for part in range(0, num_ranges):
        ptrs = partial_ptr + (part * width + d[:, None]) * PIXELS + index[None, :]
        sums += tl.load(ptrs, mask=here, other=0.0)
    channel, place = _channel(index, PIXELS, CHANNELS_LAST)
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    offset = tl.where(channel == 0, offset_0, tl.where(channel == 1, offset_1, offset_2))
    level = tl.load(grad_bias_ptr + d, mask=d < width, other=0.0)
    grad = (sums + level[:, None] * offset[None, :]) * scale[None, :]
    tl.store(
        grad_weight_ptr + d[:, None] * PIXELS + place[None, :], grad.to(grad_weight_ptr.dtype.element_ty), mask=here
    )
