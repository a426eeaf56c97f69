"""Which implementation runs, and how Triton kernels are launched. Everything here works without Triton.

The environment variable VJEPA_FAST_OPS is read at every call: `triton` demands the kernels, `ref` plain PyTorch; unset,
kernels run on CUDA tensors. On CPU tensors kernels run only if demanded, in Triton's interpreter (TRITON_INTERPRET=1
before the first import of triton): a thousand times slower than PyTorch, it is for tests. float64 always takes PyTorch,
as the kernels compute in fp32.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

launches: Counter[str] = Counter()
"""How often each kernel was launched, by its name."""
kernels_of: dict[str, int] = {}
"""Kernels that a call of an operator launches, PyTorch's included, by its name; one where it is not here."""


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit where there is Triton; without it the function stays as it is and is never called."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def constant_result(function: Callable[..., Any]) -> Any:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def _choose(device_type: str) -> bool:
    choice = os.environ.get("VJEPA_FAST_OPS", "")
    if choice not in ("", "ref", "triton"):
        raise ValueError(f"VJEPA_FAST_OPS={choice!r}; expected ref, triton, or nothing for the default")
    can = triton is not None and (device_type == "cpu" if interpreted() else device_type == "cuda")
    if choice == "triton" and not can:
        why = "Triton is not installed" if triton is None else f"the tensors are on {device_type!r}"
        raise ValueError(
            f"VJEPA_FAST_OPS=triton, but {why}; kernels need CUDA tensors, or with TRITON_INTERPRET=1 "
            "tensors on the CPU"
        )
    return choice == "triton" or (can and choice == "" and device_type == "cuda")


def use_triton(*tensors: Tensor) -> bool:
    """Whether the kernels serve these operands; constant within a compiled region.

    Raises:
        ValueError: VJEPA_FAST_OPS has an unknown value or demands what cannot be had.
    """
    return _choose(tensors[0].device.type) and all(t.dtype in KERNEL_DTYPES for t in tensors)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run and count a kernel on the device of its first argument; nothing happens where the grid is empty."""
    if 0 in grid:
        return
    launches[kernel.fn.__name__] += 1
    on_cuda = isinstance(args[0], Tensor) and args[0].is_cuda
    with torch.cuda.device(args[0].device) if on_cuda else contextlib.nullcontext():
        kernel[grid](*args, **options)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number elsewhere, so that the interpreter shares work out as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


assumed_capability = 90
"""Of tensors that are not on a GPU: the interpreter ignores it, compiling ahead of time sets it."""


def capability(device: torch.device) -> int:
    """Compute capability, as 90 for sm_90."""
    if device.type != "cuda":
        return assumed_capability
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded into a CUDA graph, so that the host must neither measure nor wait."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def row_block(width: int) -> dict[str, int]:
    """Launch options for a program that holds a row of `width` elements in registers."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense and its rows do not overlap, else a copy."""
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[-1] else x.contiguous()


MAX_ROW = 4096
"""Widest row that the row kernels hold in registers without spilling; PyTorch serves wider ones."""
