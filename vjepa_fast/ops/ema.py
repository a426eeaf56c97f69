"""Exponential moving average over many tensors in one pass: target = momentum * target + (1 - momentum) * source.

Fused: both products, their sum, and a half-precision copy of each target for the matrix products (ops/linear.py). The
targets stay in fp32: at a momentum of 0.99925 an update is below half a unit in the last place of bfloat16.
The formula is the reference's (facebookresearch/vjepa2, app/vjepa/train.py:473-480), which rounds after each of its two
passes; here it is rounded at most twice, in PyTorch as target + (1 - momentum) (source - target).

Bytes: 12 an element (both read, one written), 14 with the copy. FLOPs: 2 an element, so that memory bounds it.

Legend: N tensors, C columns of the table, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vjepa_fast.ops.triton_support.dispatch import jit, launch, tl, use_triton
from vjepa_fast.ops.triton_support.multi_tensor import BLOCK, CHUNK, is_dense, table_of


def ema_ref(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor, shadows: Sequence[Tensor]
) -> None:
    """The definition, in one pass where the momentum is a number."""
    if isinstance(momentum, Tensor):
        torch._foreach_mul_(list(targets), momentum)
        torch._foreach_add_(list(targets), torch._foreach_mul(list(sources), 1 - momentum))
    else:
        torch._foreach_lerp_(list(targets), list(sources), 1 - momentum)
    if shadows:
        torch._foreach_copy_(list(shadows), list(targets))


@jit
def _ema_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr,  # int64 [N, 3]: fp32 target, fp32 source, half-precision copy or 0
    sizes_ptr,  # int64 [N]
    chunks_ptr,  # int32 [K, 2]
    momentum_ptr,  # fp64 scalar
    SHADOW_FP16: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program).to(tl.int64)
    first = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(sizes_ptr + tensor)
    target_ptr = tl.load(addresses_ptr + 3 * tensor).to(tl.pointer_type(tl.float32))
    source_ptr = tl.load(addresses_ptr + 3 * tensor + 1).to(tl.pointer_type(tl.float32))
    shadow_address = tl.load(addresses_ptr + 3 * tensor + 2)
    shadow_ptr = shadow_address.to(tl.pointer_type(tl.float16 if SHADOW_FP16 else tl.bfloat16))
    if ALIGNED:
        size = tl.multiple_of(size, 16)
        target_ptr = tl.multiple_of(target_ptr, 16)
        source_ptr = tl.multiple_of(source_ptr, 16)
        shadow_ptr = tl.multiple_of(shadow_ptr, 16)
    momentum = tl.load(momentum_ptr)
    kept = momentum.to(tl.float32)
    taken = (1.0 - momentum).to(tl.float32)
    for start in range(0, min(CHUNK, size - first), BLOCK):
        cols = first + start + tl.arange(0, BLOCK)
        inside = cols < size
        target = tl.load(target_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        source = tl.load(source_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        target = target * kept + source * taken
        tl.store(target_ptr + cols, target, mask=inside)
        if shadow_address != 0:
            tl.store(shadow_ptr + cols, target.to(shadow_ptr.dtype.element_ty), mask=inside)


torch.library.define(
    "vjepa_fast::ema_", "(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, Tensor(b!)[] shadows) -> ()"
)


@torch.library.register_fake("vjepa_fast::ema_")
def _no_outputs(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor, shadows: Sequence[Tensor]
) -> None:
    pass


def _ema(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor, shadows: Sequence[Tensor]) -> None:
    copies: Sequence[Tensor | None] = shadows or [None] * len(targets)
    table = table_of([targets, sources, copies], targets[0].device)
    half = shadows[0].dtype if shadows else torch.bfloat16
    for chunks, is_aligned in table.launches():
        launch(
            _ema_kernel,
            (len(chunks),),
            table.addresses,
            table.sizes,
            chunks,
            momentum,
            SHADOW_FP16=half == torch.float16,
            ALIGNED=is_aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=4,
        )


torch.library.impl("vjepa_fast::ema_", ("cpu", "cuda"), _ema)


@torch.no_grad()
def ema_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor, shadows: Sequence[Tensor] = ()
) -> None:
    """Move `targets` towards `sources`, in place.

    Args:
        targets: float tensors on one device.
        sources: of the same shapes, dtypes and strides.
        momentum: share that is kept, 0 to 1; a scalar tensor on the device may change between replays of a graph.
        shadows: none, or for each target a tensor of its shape and strides that receives it in half precision.

    Raises:
        ValueError: lists of different lengths or shapes.
    """
    if len(targets) != len(sources) or (shadows and len(shadows) != len(targets)):
        raise ValueError(
            f"{len(targets)} targets, {len(sources)} sources and {len(shadows)} shadows; expected one "
            "source for each target, and one shadow for each or none"
        )
    for target, *others in zip(targets, sources, *([shadows] if shadows else []), strict=True):
        if any(other.shape != target.shape for other in others):
            raise ValueError(
                f"a target of shape {list(target.shape)} is paired with {[list(other.shape) for other in others]}"
            )
    if not targets:
        return
    fits = all(
        t.dtype == s.dtype == torch.float32 and t.stride() == s.stride() and is_dense(t)
        for t, s in zip(targets, sources, strict=True)
    ) and all(
        s.stride() == t.stride() and s.dtype == shadows[0].dtype and s.dtype in (torch.bfloat16, torch.float16)
        for s, t in zip(shadows, targets, strict=False)
    )
    if not (fits and use_triton(*targets)):
        return ema_ref(targets, sources, momentum, shadows)
    if not isinstance(momentum, Tensor):
        momentum = torch.full((), momentum, dtype=torch.float64, device=targets[0].device)
    torch.ops.vjepa_fast.ema_(list(targets), list(sources), momentum.double(), list(shadows))
    torch.autograd.graph.increment_version([*targets, *shadows])
