"""The interpreter as repaired for bfloat16, against PyTorch, bit for bit; and how the test floor chooses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from vjepa_fast.ops.triton_support import dispatch  # noqa: E402

needs_interpreter = pytest.mark.skipif(not dispatch.interpreted(), reason="kernels run on the GPU")


@triton.jit
def _cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols).to(y_ptr.dtype.element_ty))


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, less_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + cols), tl.load(y_ptr + cols)
    tl.store(out_ptr + cols, x * y + x * 2.0)
    tl.store(less_ptr + cols, (x < y).to(tl.int8))


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    index = cols[:, None] * BLOCK + cols[None, :]
    tl.store(out_ptr + index, tl.dot(tl.load(x_ptr + index), tl.load(y_ptr + index)))


@needs_interpreter
def test_rounds_to_nearest_even(kernels):
    """All patterns of the upper half, with lower halves below, at and above the middle: ties, subnormals, inf, NaN."""
    upper = torch.arange(2**16, dtype=torch.int32).repeat(4) << 16
    lower = torch.tensor([0x7FFF, 0x8000, 0x8001, 0], dtype=torch.int32).repeat_interleave(2**16)
    x = (upper | lower).view(torch.float32)
    rounded = torch.empty(len(x), dtype=torch.bfloat16)
    _cast[(1,)](x, rounded, BLOCK=len(x))
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty_like(x)
    _cast[(1,)](rounded, back, BLOCK=len(x))
    torch.testing.assert_close(back, rounded.float(), rtol=0, atol=0, equal_nan=True)


@needs_interpreter
def test_arithmetic(kernels):
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, less = torch.empty_like(x), torch.empty(1024, dtype=torch.int8)
    _arithmetic[(1,)](x, y, out, less, BLOCK=1024)
    assert torch.equal(out, x * y + x * 2.0)
    assert torch.equal(less.bool(), x < y)


@needs_interpreter
def test_matrix_product(kernels):
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(32, 32)
    _product[(1,)](x, y, out, BLOCK=32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


STOCK = """
import torch, triton, triton.language as tl
@triton.jit
def cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols).to(tl.bfloat16))
x = torch.linspace(1, 2, 64)
y = torch.empty(64, dtype=torch.bfloat16)
cast[(1,)](x, y, BLOCK=64)
print(torch.equal(y, x.bfloat16()))
"""


@needs_interpreter
def test_the_repair_is_still_needed(tmp_path):
    """Once this fails, Triton rounds by itself and tests/helpers/interpreter.py has less to do."""
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_OPS", "cuda")
    with pytest.raises(ValueError, match="VJEPA_FAST_OPS='cuda'; expected ref, triton"):
        dispatch.use_triton(torch.zeros(1))


def test_choice(monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    assert not dispatch.use_triton(torch.zeros(1))
    monkeypatch.setenv("VJEPA_FAST_OPS", "triton")
    if dispatch.interpreted():
        assert dispatch.use_triton(torch.zeros(1)) and not dispatch.use_triton(torch.zeros(1, dtype=torch.float64))
        monkeypatch.delenv("VJEPA_FAST_OPS")
        assert not dispatch.use_triton(torch.zeros(1))
    monkeypatch.setenv("VJEPA_FAST_OPS", "triton")
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.use_triton(torch.zeros(1))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from vjepa_fast.ops.layer_norm import LayerNorm
from vjepa_fast.ops.latent_loss import latent_loss
x = torch.randn(3, 8, requires_grad=True)
latent_loss(LayerNorm(8)(x), torch.randn(3, 8), torch.ones(3)).backward()
print(x.grad.isfinite().all().item())
"""


def test_works_without_triton():
    env = {k: v for k, v in os.environ.items() if k != "VJEPA_FAST_OPS"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
