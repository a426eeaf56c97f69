"""Tubelets of a clip to tokens: gather, normalise, project, add positions, for the kept tokens only.

A token is P = tubelet * patch^2 * 3 pixels (2 x 16 x 16 x 3 = 1536) times the kernel of a 3-D convolution whose stride
is its size, so it is a matrix product. Fused: gather of the pixels of the tokens asked for, normalisation, product,
bias, position table, cast; the backward makes the gradients of weight and bias from the pixels themselves.

Normalisation is folded into the weight. The product is of (x - 128) / 64, which is exact for a uint8 x in every dtype,
with w' = w * 64 / (255 std), rounded to that dtype; the power of two keeps w' in the range of w, as fp16 needs. What is
left of the mean, sum of (128 - 255 mean) / 64 * w', is taken from the rounded w' and added to the bias in fp32. So the
error is that of rounding the weight, without that of rounding normalised pixels. The gradient is unfolded in fp32. The
fold reads the fp32 master, not its shadow: one small launch a call, and nothing is copied from the host.

The inner index of the product runs over (tubelet, patch row, patch column, channel) of channels-last clips: runs of
3 * patch bytes, cut into tiles of 64 values by division by a constant. Where 16 divides 3 * patch and the strides, the
compiler proves that 16 neighbours are contiguous and reads 8 or 16 bytes at once. Blocks of whole runs (48 of 64 lanes)
would read as well and waste a quarter of the product. Other strides take the order of the weight, runs of `patch`
values.

Bytes at least, with s the size of an element of the result: forward K P + 4 D P + K D s (with a table 4 N D more),
backward the same. The kernels add the folded weight (D P s, which stays in the cache), the gradient once more for that
of the bias (K D s) and the partial sums (8 S D P, within the cache). FLOPs: 2 K P D forward, 2 K P D backward, which
bound it. On an H200 (4.8 TB/s, 790 TFLOP/s) with 24 clips of N = 2048, D = 1024, P = 1536, bf16: 196 us for all tokens
(38 us for the bytes), 4 ns a context token forward and as much backward.

Partial sums of the weight gradient go over a number of token ranges S that depends on shapes and the device only, then
over the ranges: the same bits at every run.

Legend: B clips, T frames, H W pixels, N tokens of a clip, K tokens asked for, D width, P pixel values of a token,
S ranges of tokens.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from vjepa_fast.ops._patch_embed_kernels import (
    _patch_embed_bwd_kernel,
    _patch_embed_fold_kernel,
    _patch_embed_fwd_kernel,
    _patch_embed_unfold_kernel,
)
from vjepa_fast.ops.linear import linear
from vjepa_fast.ops.triton_support.dispatch import (
    KERNEL_DTYPES,
    capability,
    kernels_of,
    launch,
    num_multiprocessors,
    use_triton,
)

# ImageNet statistics, as the reference normalises clips (app/vjepa/transforms.py).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def _statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(MEAN, dtype=torch.float32, device=device) * 255.0
    std = torch.tensor(STD, dtype=torch.float32, device=device) * 255.0
    return mean.to(dtype), std.to(dtype)


_cached_statistics = functools.cache(_statistics)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels [..., 3] to (x - 255 mean) / (255 std) in `dtype`."""
    # The copy from the host waits for the device, so once; but a traced or fake tensor must not outlive its trace.
    plain = type(pixels) is Tensor and not torch.compiler.is_compiling()
    mean, std = (_cached_statistics if plain else _statistics)(pixels.device, dtype)
    return pixels.to(dtype).sub_(mean).div_(std)


def patch_embed_ref(
    clips: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, dtype: torch.dtype, table: Tensor | None
) -> Tensor:
    """The definition; arguments as patch_embed. Pixels are normalised in at least fp32 and rounded to `dtype`."""
    _, _, tubelet, patch, _ = weight.shape
    tubelets = rearrange(clips, "b (t pt) (h ph) (w pw) c -> b t h w pt ph pw c", pt=tubelet, ph=patch, pw=patch)
    if rows is None:
        pixels = tubelets.flatten(0, 3)
    else:
        _, num_frames, height, width = tubelets.shape[:4]
        index = torch.unravel_index(rows, (len(clips), num_frames, height, width))
        pixels = tubelets[index]
    wide = torch.promote_types(dtype, torch.float32)
    pixels = normalise(pixels, wide) if clips.dtype == torch.uint8 else pixels.to(wide)
    kernel = rearrange(weight, "d c pt ph pw -> d (pt ph pw c)")
    tokens = linear(pixels.flatten(1).to(dtype), kernel, bias)
    if table is None:
        return tokens
    table = table.to(dtype)
    if rows is None:
        return (tokens.view(len(clips), *table.shape) + table).flatten(0, 1)
    return tokens + table[rows % len(table)]


# Rounded to fp32 as normalise has them.
_MEAN_255, _STD_255 = (x.tolist() for x in _statistics(torch.device("cpu"), torch.float32))
_CENTRED = (*(64.0 / s for s in _STD_255), *((128.0 - m) / 64.0 for m in _MEAN_255))
_AS_IT_IS = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)

WORKSPACE = 32 * 2**20
"""Bytes of partial weight gradients at most, unless one range needs more; they then stay in the cache of a GPU."""


def _num_ranges(num_tiles: int, num_bytes: int, count: int, device: torch.device) -> int:
    """Ranges of at least 128 tokens, within WORKSPACE, that leave the fewest multiprocessors idle, with two programs on
    each."""
    num = 2 * num_multiprocessors(device)
    most = max(1, min(WORKSPACE // num_bytes, count // 128))
    return max(range(1, most + 1), key=lambda s: num_tiles * s / (-(-num_tiles * s // num) * num))


def _tiles(dtype: torch.dtype, rows: int, cols: int, patch: int, wide: bool) -> tuple[int, int, int, dict[str, int]]:
    """Tile of a product [rows, cols], of its sum, and launch options.

    A tile of 128 x 256 reads least, but its sums fill the registers of 8 warps: only where the tensor cores work
    asynchronously and little else is held (`wide`). The fp32 product runs on the ordinary units, in tiles of at most 32
    rows: from 64 on, Triton (3.7) gives it to the tensor cores of sm_100 as TF32 if an operand was a narrower type,
    whatever input_precision says. Pixels that are read one by one or in pairs (`patch` not a multiple of 8) take more
    addresses, so a thread has fewer of them.
    """
    single = dtype == torch.float32
    most = (32, 64) if single else (128, 256 if wide else 128)
    tile_rows, tile_cols = (
        min(size, max(16, 1 << (n - 1).bit_length())) for n, size in zip((rows, cols), most, strict=True)
    )
    if single:
        return tile_rows, tile_cols, 16, {"num_warps": 4, "num_stages": 2}
    in_runs = patch % 8 == 0
    warps = 4 if in_runs and tile_rows * tile_cols < 128 * 128 else 8
    return tile_rows, tile_cols, 64 if in_runs else 32, {"num_warps": warps, "num_stages": 3}


def _geometry(clips: Tensor, tubelet: int, patch: int) -> dict[str, int | bool]:
    return {
        "TUBELET": tubelet,
        "PATCH": patch,
        "CHANNELS_LAST": clips.stride(4) == 1 and clips.stride(3) == 3,
        "CENTRE": clips.dtype == torch.uint8,
    }


torch.library.define(
    "vjepa_fast::patch_embed_fwd",
    "(Tensor clips, Tensor weight, Tensor bias, Tensor? rows, Tensor? table, ScalarType dtype)"
    " -> (Tensor tokens, Tensor places)",
)
torch.library.define(
    "vjepa_fast::patch_embed_bwd",
    "(Tensor grad, Tensor clips, Tensor places, int tubelet, int patch, ScalarType dtype)"
    " -> (Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake("vjepa_fast::patch_embed_fwd")
def _fwd_outputs(
    clips: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, table: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch_size, num_frames, height, width, _ = clips.shape
    patch = weight.shape[3]
    if rows is None:
        count = batch_size * (num_frames // weight.shape[2]) * (height // patch) * (width // patch)
    else:
        count = rows.shape[0]
    return (
        torch.empty((count, weight.shape[0]), dtype=dtype, device=clips.device),
        torch.empty(count, dtype=torch.int64, device=clips.device),
    )


@torch.library.register_fake("vjepa_fast::patch_embed_bwd")
def _bwd_outputs(
    grad: Tensor, clips: Tensor, places: Tensor, tubelet: int, patch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    width = grad.shape[1]
    return (
        torch.empty((width, 3, tubelet, patch, patch), dtype=dtype, device=grad.device),
        torch.empty(width, dtype=torch.float32, device=grad.device),
    )


def _patch_embed_fwd(
    clips: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, table: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    outputs = tokens, places = _fwd_outputs(clips, weight, bias, rows, table, dtype)
    count, width = tokens.shape
    if count == 0:
        return outputs
    _, _, tubelet, patch, _ = weight.shape
    geometry = _geometry(clips, tubelet, patch)
    tokens_h, tokens_w = clips.shape[2] // patch, clips.shape[3] // patch
    num_tokens = clips.shape[1] // tubelet * tokens_h * tokens_w
    pixels = 3 * tubelet * patch * patch
    folded = torch.empty((width, pixels), dtype=dtype, device=clips.device)
    folded_bias = torch.empty(width, dtype=torch.float32, device=clips.device)
    launch(
        _patch_embed_fold_kernel,
        (-(-width // 4),),
        weight.contiguous(),
        bias.contiguous(),
        folded,
        folded_bias,
        width,
        *(_CENTRED if geometry["CENTRE"] else _AS_IT_IS),
        PIXELS=pixels,
        CHANNELS_LAST=geometry["CHANNELS_LAST"],
        BLOCK_D=4,
        BLOCK_P=512,
        num_warps=4,
    )
    block_m, block_n, block_k, options = _tiles(
        dtype, 128, width, patch, capability(clips.device) // 10 in (9, 10) and patch % 16 == 0 and table is None
    )
    launch(
        _patch_embed_fwd_kernel,
        (-(-count // block_m) * -(-width // block_n),),
        clips,
        None if rows is None else rows.contiguous(),
        folded,
        folded_bias,
        None if table is None else table.contiguous(),
        tokens,
        places,
        *clips.stride(),
        count,
        width,
        num_tokens,
        tokens_h,
        tokens_w,
        **geometry,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **options,
    )
    return outputs


def _patch_embed_bwd(
    grad: Tensor, clips: Tensor, places: Tensor, tubelet: int, patch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    count, width = grad.shape
    grad_bias = grad.sum(0, dtype=torch.float32)
    grad_weight, _ = _bwd_outputs(grad, clips, places, tubelet, patch, dtype)
    if count == 0:
        return grad_weight.zero_(), grad_bias
    geometry = _geometry(clips, tubelet, patch)
    pixels = 3 * tubelet * patch * patch
    # Pixels are converted between two products, so that two small programs a multiprocessor beat a wide one.
    block_d, block_p, block_t, options = _tiles(grad.dtype, width, pixels, patch, False)
    num_tiles = -(-width // block_d) * -(-pixels // block_p)
    num_ranges = _num_ranges(num_tiles, 4 * width * pixels, count, clips.device)
    per_range = -(-count // (num_ranges * block_t)) * block_t
    partial = torch.empty((num_ranges, width, pixels), dtype=torch.float32, device=clips.device)
    launch(
        _patch_embed_bwd_kernel,
        (num_tiles, num_ranges),
        grad.contiguous(),
        clips,
        places,
        partial,
        *clips.stride(),
        count,
        width,
        per_range,
        **geometry,
        BLOCK_D=block_d,
        BLOCK_P=block_p,
        BLOCK_T=block_t,
        **options,
    )
    launch(
        _patch_embed_unfold_kernel,
        (-(-width // 4), -(-pixels // 512)),
        partial,
        grad_bias,
        grad_weight,
        num_ranges,
        width,
        *(_CENTRED if geometry["CENTRE"] else _AS_IT_IS),
        PIXELS=pixels,
        CHANNELS_LAST=geometry["CHANNELS_LAST"],
        BLOCK_D=4,
        BLOCK_P=512,
        num_warps=4,
    )
    return grad_weight, grad_bias


torch.library.impl("vjepa_fast::patch_embed_fwd", ("cpu", "cuda"), _patch_embed_fwd)
torch.library.impl("vjepa_fast::patch_embed_bwd", ("cpu", "cuda"), _patch_embed_bwd)
# The folded weight comes first. Backward: the gradient of the bias, the product, the unfolded sums of its ranges.
kernels_of.update(patch_embed_fwd=2, patch_embed_bwd=3)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, clips: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, table: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        tokens, places = torch.ops.vjepa_fast.patch_embed_fwd(clips, weight, bias, rows, table, dtype)
        ctx.save_for_backward(clips, places)
        ctx.kernel = weight.shape[2], weight.shape[3], weight.dtype
        ctx.bias_dtype = bias.dtype
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad_weight, grad_bias = torch.ops.vjepa_fast.patch_embed_bwd(grad, *ctx.saved_tensors, *ctx.kernel)
        return None, grad_weight, grad_bias.to(ctx.bias_dtype), None, None, None


def patch_embed(
    clips: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """Tokens of clips.

    Args:
        clips: [B, T, H, W, 3], of any strides; uint8 is normalised here, a float clip is taken as normalised.
        weight: [D, 3, tubelet, patch, patch], the convolution kernel.
        bias: [D].
        rows: int64 [K], clip * N + token id; None: all tokens of all clips in order.
        dtype: of the result and of the product's operands.
        table: [N, D], added to the token of each id; None: nothing is added.

    Returns:
        [K, D].

    Raises:
        ValueError: shapes that do not match.
    """
    if (
        clips.ndim != 5
        or weight.ndim != 5
        or clips.shape[4] != 3
        or weight.shape[1] != 3
        or weight.shape[3] != weight.shape[4]
        or bias.shape != weight.shape[:1]
    ):
        raise ValueError(
            f"clips have shape {list(clips.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}; "
            "expected [B, T, H, W, 3], [D, 3, tubelet, patch, patch], [D]"
        )
    grid = [side // unit for side, unit in zip(clips.shape[1:4], weight.shape[2:], strict=True)]
    if [side % unit for side, unit in zip(clips.shape[1:4], weight.shape[2:], strict=True)] != [0, 0, 0]:
        raise ValueError(
            f"clips have {list(clips.shape[1:4])} frames, height and width; expected multiples of the "
            f"weight's {list(weight.shape[2:])}"
        )
    if table is not None and list(table.shape) != [grid[0] * grid[1] * grid[2], weight.shape[0]]:
        raise ValueError(
            f"table has shape {list(table.shape)}; expected "
            f"{[grid[0] * grid[1] * grid[2], weight.shape[0]]}, a row for each token of a clip"
        )
    # The kernels give no gradient to clips and table, and keep a token's place in 16 bits an axis.
    served = (
        clips.dtype in (torch.uint8, *KERNEL_DTYPES)
        and dtype in KERNEL_DTYPES
        and len(clips) < 2**15
        and max(grid) < 2**16
        and not (torch.is_grad_enabled() and (clips.requires_grad or (table is not None and table.requires_grad)))
    )
    if use_triton(weight, bias, *(() if table is None else (table,))) and served:
        tokens: Tensor = _PatchEmbed.apply(clips, weight, bias, rows, table, dtype)
        return tokens
    return patch_embed_ref(clips, weight, bias, rows, dtype, table)
