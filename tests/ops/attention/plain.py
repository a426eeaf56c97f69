"""Packed attention in plain PyTorch, forward and backward, as the stand-ins for libraries compute it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _sequences(cu: Tensor, longest: int, *operands: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    assert isinstance(longest, int) and cu.dtype == torch.int32 and cu.stride(0) == 1 and cu[0] == 0
    for x in operands:
        assert x.ndim == 3 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 4 == 0
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        assert end - start <= longest
        yield slice(start, end), [x[start:end].movedim(0, 1).double() for x in operands]


def plain_forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output [L, H, D] and log-sum-exp [H, L]."""
    out = q.new_full(q.shape, float("nan"))
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"), device=q.device)
    # fp32 would be too coarse for tests in fp64.
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    for rows, (a, b, c) in _sequences(cu, longest, q, k, v):
        scores = a @ b.mT * scale
        lse[:, rows] = scores.logsumexp(-1).to(lse.dtype)
        out[rows] = (scores.softmax(-1) @ c).movedim(0, 1).to(out.dtype)
    return out, lse


def plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes dq, dk, dv."""
    for x in (dq, dk, dv):
        assert x.shape == q.shape and x.dtype == q.dtype and 0 not in x.stride()
        x.fill_(float("nan"))
    assert grad.shape == out.shape == q.shape and lse.shape == (q.shape[1], q.shape[0])
    for rows, (g, a, b, c, o) in _sequences(cu, longest, grad, q, k, v, out):
        weights = (a @ b.mT * scale - lse[:, rows, None]).exp()
        slopes = weights * (g @ c.mT - (g * o).sum(-1, keepdim=True)) * scale
        for target, value in ((dq, slopes @ b), (dk, slopes.mT @ a), (dv, weights.mT @ g)):
            target[rows] = value.movedim(0, 1).to(target.dtype)
