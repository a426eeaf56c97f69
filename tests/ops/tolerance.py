"""How far a kernel may be from the truth: no further than twice the same lines in PyTorch, and a floor from the data.

The rule of FlashAttention's tests: the error of the kernel against fp64 is at most twice that of the PyTorch expression
on operands of the same dtype, plus two units in the last place of the largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def floor_of(truth: Tensor, dtype: torch.dtype) -> float:
    """Two units in the last place of the largest value."""
    return 2.0 * torch.finfo(dtype).eps * float(truth.detach().abs().max()) if truth.numel() else 0.0


def assert_as_good(name: str, ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """`ours` of the kernel and `plain` of PyTorch, of one dtype, against `truth` in fp64."""
    assert ours.dtype == plain.dtype, f"{name}: {ours.dtype}, expected {plain.dtype}"
    assert ours.shape == plain.shape == truth.shape, f"{name}: {list(ours.shape)}, expected {list(truth.shape)}"
    if not truth.numel():
        return
    mine, theirs = (float((x.double() - truth).detach().abs().max()) for x in (ours, plain))
    limit = 2.0 * theirs + floor_of(truth, ours.dtype)
    assert mine <= limit, f"{name}: error {mine:.3g}, PyTorch's own {theirs:.3g}, limit {limit:.3g}"
