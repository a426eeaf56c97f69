"""Linear layers that compute in half precision behind fp32 parameters.

The parameters are the masters: fp32, ordinary nn.Parameters, the autograd leaves. The product is taken with a shadow, a
copy of the master in the compute dtype, and the weight gradient goes to the master. So any optimizer, DDP and gradient
clipping see nothing unusual, and no autocast is needed.

A shadow is made when a layer runs. An optimizer that has just written master and shadow together may mark the shadow
fresh instead; it then counts until any torch optimizer steps, and only while the master's version counter and its
storage are those it was made from. (The version counter alone is not enough: torch's fused optimizers and writes
through `.data` leave it as it was.) Call `drop_shadow` after writing to such a parameter through `.data`.

Legend: L tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vjepa_fast.ops.fp8_linear import fp8_linear

_num_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


register_optimizer_step_pre_hook(_count_step)


def _state(master: Tensor) -> tuple[int, int, int]:
    return _num_optimizer_steps, master._version, master.data_ptr()


def mark_shadow_fresh(master: Tensor, shadow: Tensor) -> None:
    """Declare `shadow` equal to `master` rounded to its dtype, until the master changes."""
    master._vf_shadow = (_state(master), shadow)  # type: ignore[attr-defined]


def drop_shadow(master: nn.Parameter) -> None:
    """Forget the shadow that was marked fresh."""
    if hasattr(master, "_vf_shadow"):
        del master._vf_shadow


STALE = (
    "fp32 weights are out of date on this process, which updates a share of them only; call the optimizer's "
    "refresh() first, on all processes"
)


def mark_stale(master: Tensor) -> None:
    """Declare a master out of date, until it is written to; only its fresh shadow holds the right values."""
    master._vf_behind = master._version  # type: ignore[attr-defined]


def mark_current(master: Tensor) -> None:
    """Take `mark_stale` back."""
    master._vf_behind = None  # type: ignore[attr-defined]


def is_stale(master: Tensor) -> bool:
    """Whether a master is declared out of date."""
    return getattr(master, "_vf_behind", None) == master._version


def shadow_of(master: Tensor, dtype: torch.dtype) -> Tensor:
    """The master in the compute dtype: the shadow marked fresh if it is valid, else a fresh copy.

    Raises:
        RuntimeError: there is no valid shadow, and the master is out of date.
    """
    state, shadow = getattr(master, "_vf_shadow", (None, None))
    if shadow is not None and shadow.dtype == dtype and state == _state(master):
        return shadow
    if is_stale(master):
        raise RuntimeError(STALE)
    return master.detach().to(dtype)


class _ShadowLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, low_bias: Tensor | None, gathered: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight if gathered else low)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, low, low_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, low = ctx.saved_tensors
        # Of a master that is freed in between this is a copy made anew.
        low = low.to(x.dtype)
        weight_dtype, bias_dtype = ctx.dtypes
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad @ low if ctx.needs_input_grad[0] else None
        grad_weight = (flat_grad.t() @ flat_x).to(weight_dtype) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = flat_grad.sum(0, dtype=bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


Affine = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Weight and bias of a linear layer, and their shadows; shadows that are None: the masters serve."""


def operands(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Affine:
    """What `linear_by` multiplies inputs of `dtype` with.

    Shadows are looked up by attributes, version counters and addresses, none of which a compiler can trace; what is
    done with them it can.
    """
    if dtype == weight.dtype:
        return weight, bias, None, None
    return weight, bias, shadow_of(weight, dtype), None if bias is None else shadow_of(bias, dtype)


def linear_by(x: Tensor, affine: Affine, gathered: bool = False) -> Tensor:
    """`linear`, with the shadows at hand: x [..., I] to [..., O]."""
    weight, bias, low, low_bias = affine
    if low is None:
        return F.linear(x, weight, bias)
    out: Tensor = _ShadowLinear.apply(x, weight, bias, low, low_bias, gathered)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gathered: bool = False) -> Tensor:
    """x @ weight.T + bias in the dtype of x.

    Args:
        x: [..., I].
        weight: [O, I], of x's dtype or wider; its gradient has its own dtype.
        bias: [O] or None.
        gathered: see Linear.
    """
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return linear_by(x, operands(weight, bias, x.dtype), gathered)


class Linear(nn.Linear):
    """nn.Linear that follows the dtype of its input, see the module docstring."""

    float8 = False
    """Multiply in float8 where no gradient is wanted; see ops/fp8_linear.py."""
    gathered = False
    """The weight is put together for the forward and again for the backward, and freed in between (FSDP2): so is its
    shadow, which would else stay in memory as a copy of the whole weight."""

    def forward(self, input: Tensor) -> Tensor:
        if self.float8 and not torch.is_grad_enabled():
            return fp8_linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias, self.gathered)

    def operands(self, dtype: torch.dtype) -> Affine:
        """For linear_by."""
        return operands(self.weight, self.bias, dtype)
