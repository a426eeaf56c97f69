"""Linear layers whose products run in float8 (e4m3), forward only: an option for the target encoder.

Each row of the input and each output feature of the weight gets a scale that maps its largest element to 448, the
largest number of the format; products accumulate in fp32 and are multiplied by both scales (torch's scaled_mm, on
compute capability 8.9 and up; a CPU emulates it). The result is inexact: three bits of mantissa are left, a relative
error of up to 2^-4 an element. No gradient exists.

Fused: largest magnitude, division, rounding and packing of a row in one reading. Weights are quantised at every call,
from whatever they are at that moment.

Bytes of quantising, with s the size of an element: L I (s + 1) + 4 L. FLOPs: about 4 L I, so that memory bounds it; the
product takes 2 L I O at twice the rate of half precision.

Legend: L rows, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.ops.triton_support.dispatch import (
    MAX_ROW,
    capability,
    jit,
    launch,
    row_block,
    rows_contiguous,
    tl,
    use_triton,
)

LARGEST = 448.0
"""Of torch.float8_e4m3fn."""
UNIT = 16
"""Both widths of the product must be multiples of this."""


def quantise_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition; see quantise_rows."""
    wide = x.to(torch.float32)
    # A row of zeros has scale 1 / 448 and stays zeros; a NaN makes its whole row NaN.
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


@jit
def _quantise_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [L, I], row stride x_stride
    y_ptr,  # float8 [L, I]
    scale_ptr,  # fp32 [L]
    x_stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    # A maximum may leave a NaN out, a sum does not.
    largest = tl.where(tl.sum(x * 0.0, 0) == 0.0, largest, float("nan"))
    scale = tl.where(largest == 0.0, 1.0, largest) / 448.0
    y = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    y = tl.where(scale == scale, y, float("nan"))
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


torch.library.define("vjepa_fast::quantise_rows", "(Tensor x) -> (Tensor y, Tensor scale)")


@torch.library.register_fake("vjepa_fast::quantise_rows")
def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device),
    )


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    y, scale = _outputs(x)
    x = rows_contiguous(x)
    launch(_quantise_rows_kernel, (x.shape[0],), x, y, scale, x.stride(0), x.shape[1], **row_block(x.shape[1]))
    return y, scale


torch.library.impl("vjepa_fast::quantise_rows", ("cpu", "cuda"), _quantise_rows)


@torch.no_grad()
def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in float8, row by row; x is about y * scale.

    Args:
        x: [L, I], any float dtype.

    Returns:
        torch.float8_e4m3fn [L, I] and fp32 [L, 1]. A row that holds anything not finite is NaN.
    """
    if use_triton(x) and x.shape[1] <= 2 * MAX_ROW:
        y, scale = torch.ops.vjepa_fast.quantise_rows(x)
        return y, scale
    return quantise_rows_ref(x)


def check_device(device: torch.device) -> None:
    """Raises ConfigError where there are no float8 products."""
    if device.type == "cuda" and capability(device) < 89:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"model.target_precision is float8, but {name} has compute capability "
            f"{capability(device) / 10}; float8 products need 8.9 or higher, `same` works everywhere"
        )


def serves(weight: Tensor) -> bool:
    """Whether a weight [O, I] has widths that float8 products take."""
    return weight.ndim == 2 and weight.shape[0] % UNIT == 0 and weight.shape[1] % UNIT == 0


@torch.no_grad()
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias with float8 operands, in the dtype of x.

    Args:
        x: [..., I], torch.bfloat16, float16 or float32.
        weight: [O, I], any float dtype; I and O multiples of 16.
        bias: [O] or None.
    """
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], weight.shape[0]))
    rows, row_scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    columns, column_scale = quantise_rows(weight)
    # The product knows row scales for results in bfloat16 only, and adds a bias of that dtype.
    out = torch._scaled_mm(
        rows,
        columns.t(),
        scale_a=row_scale,
        scale_b=column_scale.t(),
        out_dtype=torch.bfloat16,
        bias=None if bias is None else bias.to(torch.bfloat16),
        use_fast_accum=True,
    )
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
