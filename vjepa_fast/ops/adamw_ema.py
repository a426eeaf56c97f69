"""AdamW, the target encoder's moving average and the half-precision copies of both, all parameters in one pass.

Per element, with g the gradient and t the step count of its tensor (Loshchilov and Hutter, arXiv 1711.05101; torch's
AdamW): p *= 1 - lr * decay; m += (1 - beta1) (g - m); v += (1 - beta2) (g^2 - v);
p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps); then target = momentum * target + (1 - momentum) * p.
If the sum of the squares of all gradients is not finite, p, m, v and t stay as they are while the target moves, as in
the reference under its GradScaler. That is decided on the device.

Two kernels: one works out the factors of each tensor, in fp64 because 1 - 0.999^1 has three digits in fp32; the other
moves the data, in one launch, or two where some tensors are not aligned.

Bytes: 28 an element (p, m, v read and written, g read); with a target 8 more, with a half-precision copy 2 for each.
FLOPs: about 20 an element, so that memory bounds it.

Legend: N tensors, C columns of the table, K chunks, G parameter groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vjepa_fast.ops.ema import ema_ref
from vjepa_fast.ops.triton_support.dispatch import jit, kernels_of, launch, tl
from vjepa_fast.ops.triton_support.multi_tensor import BLOCK, CHUNK, is_dense, table_of

GROUP_VALUES = ("lr", "beta1", "beta2", "eps", "weight_decay", "ema_momentum")
"""Columns of the table of parameter groups."""


@dataclass
class Operands:
    """Lists with one entry a parameter; all tensors of an entry have one shape, and the same strides."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    """None: the parameter, its moments and its step count stay as they are."""
    exp_avgs: list[Tensor | None] = field(default_factory=list)
    """First moments; None without a gradient."""
    exp_avg_sqs: list[Tensor | None] = field(default_factory=list)
    """Second moments; None without a gradient."""
    steps: list[Tensor | None] = field(default_factory=list)
    """fp32 scalars; None without a gradient."""
    targets: list[Tensor | None] = field(default_factory=list)
    """What follows the parameter, or None."""
    shadows: list[Tensor | None] = field(default_factory=list)
    """Half-precision copies of the parameters, or None."""
    target_shadows: list[Tensor | None] = field(default_factory=list)
    """Half-precision copies of the targets, or None."""
    groups: list[int] = field(default_factory=list)
    """Number of the parameter's group."""


def adamw_ema_ref(operands: Operands, group_values: Sequence[Sequence[float]], sum_of_squares: Tensor) -> None:
    """The definition, by torch's own AdamW; group_values as GROUP_VALUES for each group."""
    o = operands
    skip = (~torch.isfinite(sum_of_squares)).float()
    for number, (lr, beta1, beta2, eps, weight_decay, momentum) in enumerate(group_values):
        members = [i for i, group in enumerate(o.groups) if group == number]
        some = [i for i in members if o.grads[i] is not None]
        if some:
            params, grads, exp_avgs, exp_avg_sqs, steps = (
                [x for i in some if (x := column[i]) is not None]
                for column in (o.params, o.grads, o.exp_avgs, o.exp_avg_sqs, o.steps)
            )
            adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                fused=True,
                found_inf=skip,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=weight_decay,
                eps=eps,
                maximize=False,
            )
        followed = [i for i in members if o.targets[i] is not None]
        if followed:
            ema_ref([o.targets[i] for i in followed], [o.params[i] for i in followed], momentum, [])  # type: ignore[misc]
    for copies, originals in ((o.shadows, o.params), (o.target_shadows, o.targets)):
        pairs = [(c, x) for c, x in zip(copies, originals, strict=True) if c is not None and x is not None]
        if pairs:
            torch._foreach_copy_([c for c, _ in pairs], [x for _, x in pairs])


@jit
def _power(base, exponent):  # type: ignore[no-untyped-def]
    """base ** exponent, elementwise: fp64 and non-negative int32."""
    result = base * 0.0 + 1.0
    for _ in range(31):
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@jit
def _adamw_ema_factors_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr,  # int64 [N, 8], the last column: fp32 step count, or 0 without a gradient
    groups_ptr,  # int64 [N]
    values_ptr,  # fp64 [G, 6], see GROUP_VALUES
    sum_of_squares_ptr,  # fp32 scalar
    factors_ptr,  # fp32 [N, 8]
    num_tensors,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < num_tensors
    values = values_ptr + 6 * tl.load(groups_ptr + tensor, mask=inside, other=0)
    lr = tl.load(values, mask=inside, other=0.0)
    beta1 = tl.load(values + 1, mask=inside, other=0.0)
    beta2 = tl.load(values + 2, mask=inside, other=0.0)
    eps = tl.load(values + 3, mask=inside, other=0.0)
    weight_decay = tl.load(values + 4, mask=inside, other=0.0)
    momentum = tl.load(values + 5, mask=inside, other=0.0)

    address = tl.load(addresses_ptr + 8 * tensor + 7, mask=inside, other=0)
    counts = inside & (address != 0)
    step_ptr = address.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=counts, other=0.0)
    # A NaN compares as false.
    if tl.load(sum_of_squares_ptr) < float("inf"):
        step += 1.0
        tl.store(step_ptr, step, mask=counts)
    number = tl.maximum(step, 1.0).to(tl.int32)
    factors = factors_ptr + 8 * tensor
    tl.store(factors, (1.0 - lr * weight_decay).to(tl.float32), mask=inside)
    tl.store(factors + 1, (lr / (1.0 - _power(beta1, number))).to(tl.float32), mask=inside)
    tl.store(factors + 2, (1.0 / tl.sqrt(1.0 - _power(beta2, number))).to(tl.float32), mask=inside)
    tl.store(factors + 3, eps.to(tl.float32), mask=inside)
    tl.store(factors + 4, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(factors + 5, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(factors + 6, momentum.to(tl.float32), mask=inside)
    tl.store(factors + 7, (1.0 - momentum).to(tl.float32), mask=inside)


@jit
def _adamw_ema_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr,  # int64 [N, 8]: param, grad, exp_avg, exp_avg_sq, target, shadow, target's shadow, step; 0 for none
    sizes_ptr,  # int64 [N]
    chunks_ptr,  # int32 [K, 2]
    factors_ptr,  # fp32 [N, 8] of the kernel above
    sum_of_squares_ptr,  # fp32 scalar
    SHADOW_FP16: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program).to(tl.int64)
    first = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(sizes_ptr + tensor)
    row = addresses_ptr + 8 * tensor
    grad_address = tl.load(row + 1)
    target_address = tl.load(row + 4)
    shadow_address = tl.load(row + 5)
    target_shadow_address = tl.load(row + 6)
    half: tl.constexpr = tl.float16 if SHADOW_FP16 else tl.bfloat16
    param_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    grad_ptr = grad_address.to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    target_ptr = target_address.to(tl.pointer_type(tl.float32))
    shadow_ptr = shadow_address.to(tl.pointer_type(half))
    target_shadow_ptr = target_shadow_address.to(tl.pointer_type(half))
    if ALIGNED:
        size = tl.multiple_of(size, 16)
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
        target_ptr = tl.multiple_of(target_ptr, 16)
        shadow_ptr = tl.multiple_of(shadow_ptr, 16)
        target_shadow_ptr = tl.multiple_of(target_shadow_ptr, 16)
    updates = (grad_address != 0) & (tl.load(sum_of_squares_ptr) < float("inf"))
    factors = factors_ptr + 8 * tensor
    decay = tl.load(factors)
    step_size = tl.load(factors + 1)
    rescale = tl.load(factors + 2)
    eps = tl.load(factors + 3)
    new1 = tl.load(factors + 4)
    new2 = tl.load(factors + 5)
    kept = tl.load(factors + 6)
    taken = tl.load(factors + 7)
    for start in range(0, min(CHUNK, size - first), BLOCK):
        cols = first + start + tl.arange(0, BLOCK)
        inside = cols < size
        param = tl.load(param_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        if updates:
            grad = tl.load(grad_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            exp_avg = tl.load(exp_avg_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            exp_avg_sq = tl.load(exp_avg_sq_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            exp_avg += new1 * (grad - exp_avg)
            exp_avg_sq += new2 * (grad * grad - exp_avg_sq)
            param = param * decay - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * rescale + eps)
            tl.store(param_ptr + cols, param, mask=inside)
            tl.store(exp_avg_ptr + cols, exp_avg, mask=inside)
            tl.store(exp_avg_sq_ptr + cols, exp_avg_sq, mask=inside)
        if shadow_address != 0:
            tl.store(shadow_ptr + cols, param.to(half), mask=inside)
        if target_address != 0:
            target = tl.load(target_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            target = target * kept + param * taken
            tl.store(target_ptr + cols, target, mask=inside)
            if target_shadow_address != 0:
                tl.store(target_shadow_ptr + cols, target.to(half), mask=inside)


# A schema has no lists of optional mutable tensors: absent ones are empty, and an entry without a gradient has no step.
torch.library.define(
    "vjepa_fast::adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps,"
    " Tensor(e!)[] targets, Tensor(f!)[] shadows, Tensor(g!)[] target_shadows, int[] groups, Tensor group_values,"
    " Tensor sum_of_squares) -> ()",
)


@torch.library.register_fake("vjepa_fast::adamw_ema_")
def _no_outputs(*_: object) -> None:
    pass


def _adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    targets: Sequence[Tensor],
    shadows: Sequence[Tensor],
    target_shadows: Sequence[Tensor],
    groups: Sequence[int],
    group_values: Tensor,
    sum_of_squares: Tensor,
) -> None:
    device, count = params[0].device, len(params)
    columns = [params, grads, exp_avgs, exp_avg_sqs, targets, shadows, target_shadows]
    table = table_of(columns, device, scalars=[steps], integers=[groups])
    factors = torch.empty((count, 8), dtype=torch.float32, device=device)
    block = 64
    launch(
        _adamw_ema_factors_kernel,
        (-(-count // block),),
        table.addresses,
        table.integers[0],
        group_values,
        sum_of_squares,
        factors,
        count,
        BLOCK=block,
        num_warps=2,
    )
    half = next((s.dtype for s in (*shadows, *target_shadows) if s.numel()), torch.bfloat16)
    for chunks, is_aligned in table.launches():
        launch(
            _adamw_ema_kernel,
            (len(chunks),),
            table.addresses,
            table.sizes,
            chunks,
            factors,
            sum_of_squares,
            SHADOW_FP16=half == torch.float16,
            ALIGNED=is_aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=4,
        )


torch.library.impl("vjepa_fast::adamw_ema_", ("cpu", "cuda"), _adamw_ema)
# The factors first, then the update.
kernels_of["adamw_ema_"] = 2


def kernels_fit(operands: Operands) -> bool:
    """Whether adamw_ema_ can take these operands; else the caller takes adamw_ema_ref, or makes them fit."""
    o = operands
    halves = {s.dtype for s in (*o.shadows, *o.target_shadows) if s is not None}
    if not o.params or len(halves) > 1 or halves - {torch.bfloat16, torch.float16}:
        return False
    device = o.params[0].device
    for row in zip(o.params, o.grads, o.exp_avgs, o.exp_avg_sqs, o.targets, o.shadows, o.target_shadows, strict=True):
        shape, strides = row[0].shape, row[0].stride()
        if not is_dense(row[0]):
            return False
        if any(x is not None and (x.stride() != strides or x.shape != shape or x.device != device) for x in row):
            return False
        if any(x is not None and x.dtype != torch.float32 for x in row[:5]):
            return False
    return all(step is None or (step.device == device and step.dtype == torch.float32) for step in o.steps)


@torch.no_grad()
def adamw_ema_(operands: Operands, group_values: Tensor, sum_of_squares: Tensor) -> None:
    """One update in place, by kernels; see kernels_fit.

    Args:
        operands: on one device, fp32 but for the shadows.
        group_values: fp64 [G, 6] on the device, in the order of GROUP_VALUES.
        sum_of_squares: fp32 scalar on the device, over all gradients of all processes. Not finite: only the targets
            move.
    """
    o = operands
    none = o.params[0].new_empty(0)

    def filled(column: Sequence[Tensor | None]) -> list[Tensor]:
        return [none if x is None else x for x in column]

    torch.ops.vjepa_fast.adamw_ema_(
        o.params,
        filled(o.grads),
        filled(o.exp_avgs),
        filled(o.exp_avg_sqs),
        filled(o.steps),
        filled(o.targets),
        filled(o.shadows),
        filled(o.target_shadows),
        o.groups,
        group_values,
        sum_of_squares,
    )
    written = (o.params, o.exp_avgs, o.exp_avg_sqs, o.steps, o.targets, o.shadows, o.target_shadows)
    torch.autograd.graph.increment_version([x for column in written for x in column if x is not None])
