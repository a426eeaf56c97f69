"""Triton's interpreter with bfloat16, and rounding to float8, as on a GPU.

The interpreter keeps bfloat16 as uint16 bit patterns. As shipped (Triton 3.6, 3.7) it cuts off instead of rounding to
nearest even, adds and multiplies the patterns as integers, and multiplies matrices of them. `repair` makes casts,
elementwise operations, scalars and tl.dot go through fp32. Reductions and atomics on bfloat16 stay wrong: kernels are
to compute in fp32. Rounding to float8 (e4m3) loses carries as shipped; it goes through PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_REPAIRED = "_vjepa_fast_bf16"


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16, of fp32 numbers rounded to nearest even; NaNs become one quiet NaN."""
    bits = np.atleast_1d(np.asarray(values, dtype=np.float32)).view(np.uint32).reshape(np.shape(values))
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x7FFF) + last_kept) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def round_to_float8(values: np.ndarray) -> np.ndarray:
    """Bit patterns, uint8, of fp32 numbers as e4m3, as PyTorch rounds them."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """fp32 numbers of bit patterns."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    return interpreter.TensorHandle(from_bf16(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(values: np.ndarray) -> Any:
    return interpreter.TensorHandle(round_to_bf16(values), tl.bfloat16)


def repair() -> None:
    """Patch the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, _REPAIRED):
        return
    stock: dict[str, Callable[..., Any]] = {
        name: getattr(builder, name)
        for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_fma", "create_dot")
    }

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.float8e4nv:
            return interpreter.TensorHandle(round_to_float8(_wide(source).data.astype(np.float32)), target.scalar)
        narrow = target.scalar == tl.bfloat16
        if not _is_bf16(source) and not narrow:
            return stock["cast_impl"](self, source, target)
        if narrow:
            return _narrow(_wide(source).data.astype(np.float32))
        return stock["cast_impl"](self, _wide(source), target) if target.scalar != tl.float32 else _wide(source)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bf16(source) or target.scalar in (tl.bfloat16, tl.float8e4nv):
            return cast_impl(self, source, target)
        return stock["create_fp_to_fp"](self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., np.ndarray]) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)):
            return stock["binary_op"](self, left, right, operation)
        values = operation(_wide(left).data, _wide(right).data)
        return interpreter.TensorHandle(values, tl.int1) if operation in _COMPARISONS else _narrow(values)

    def unary_op(self: Any, operand: Any, operation: Callable[..., np.ndarray]) -> Any:
        if not _is_bf16(operand):
            return stock["unary_op"](self, operand, operation)
        return _narrow(operation(_wide(operand).data))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return stock["create_fma"](self, x, y, z)
        return _narrow(_wide(x).data * _wide(y).data + _wide(z).data)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return stock["create_dot"](self, _wide(a), _wide(b), *rest)

    patches = (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma, create_dot)
    for patch in patches:
        setattr(builder, patch.__name__, patch)
    builder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))
    setattr(builder, _REPAIRED, True)
