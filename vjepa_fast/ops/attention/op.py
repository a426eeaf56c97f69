"""Self-attention over packed sequences: every sequence attends to itself only.

On a GPU one variable-length call of a library serves all sequences (the table is in backends.py): which one
is measured at the first use, see choice.py. Elsewhere, and in fp32 and fp64, scaled_dot_product_attention
does: neighbouring sequences of one length form a dense batch, so that a buffer with R distinct runs costs R calls and
no padding.

Rows behind the last sequence get zeros, in the output and in the gradient; what they hold must be finite, as a kernel
may load them beside a sequence's own rows.

FLOPs forward: 4 * sum(length^2) * H * D; backward 2.5 times that. Bytes of a token, with s the size of an element:
forward 4 H D s + 4 H, backward 8 H D s + 4 H.

Legend: L rows of the buffer, H heads, D head width, S sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from vjepa_fast.ops.attention import choice
from vjepa_fast.ops.attention.backends import Adapter, adapter
from vjepa_fast.ops.attention.choice import Case
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.triton_support.dispatch import constant_result, is_capturing
from vjepa_fast.ops.zero_tail import zero_tail_


def attention_ref(qkv: Tensor, packing: Packing, num_heads: int) -> Tensor:
    """The definition, a sequence at a time, in the dtype of qkv."""
    width = qkv.shape[-1] // 3
    head_dim = width // num_heads
    outputs, start = [], 0
    for length in packing.lengths:
        q, k, v = qkv[start : start + length].view(length, 3, num_heads, head_dim).permute(1, 2, 0, 3)
        weights = (q @ k.mT * head_dim**-0.5).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1).reshape(length, width))
        start += length
    return torch.cat([*outputs, qkv.new_zeros(len(qkv) - start, width)])


@contextlib.contextmanager
def _without_cudnn(qkv: Tensor) -> Iterator[None]:
    """Keeps torch from cuDNN's attention where there will be a backward pass.

    It makes a plan for each new shape, a tenth of a second on the host, and in training nearly every batch has other
    lengths. Whole clips, as the target encoder has, are of one shape. Where nothing else is allowed it may stay.
    """
    cuda = torch.backends.cuda
    others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
    if not (torch.is_grad_enabled() and qkv.requires_grad and others):
        yield
        return
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _sdpa(qkv: Tensor, packing: Packing, num_heads: int) -> Tensor:
    width = qkv.shape[-1] // 3
    sizes = [count * length for count, length in packing.runs]
    behind = qkv.shape[0] - packing.total
    parts = qkv.split([*sizes, behind]) if behind or len(sizes) > 1 else (qkv,)
    outputs = []
    for part, (count, length) in zip(parts, packing.runs, strict=False):
        if length:
            q, k, v = part.view(count, length, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
            # A compiler cannot trace the switch.
            with _without_cudnn(qkv) if qkv.is_cuda and not is_compiling() else contextlib.nullcontext():
                out = F.scaled_dot_product_attention(q, k, v)
            outputs.append(out.transpose(1, 2).reshape(count * length, width))
    if behind:
        outputs.append(qkv.new_zeros(behind, width))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _dense_parts(qkv: Tensor, packing: Packing, num_heads: int) -> list[Tensor]:
    """Of each run of sequences [3, count, H, length, D], views."""
    parts, start = [], 0
    for count, length in packing.runs:
        if length:
            rows = qkv[start : start + count * length]
            parts.append(rows.view(count, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4))
        start += count * length
    return parts


class _SdpaCpu(torch.autograd.Function):
    """_sdpa with its kernel called by hand, so that each gradient is written once, to where it belongs in the buffer.

    Autograd would gather the gradients of queries, keys and values, and then those of all runs, in two more copies.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, packing: Packing, num_heads: int) -> Tensor:  # type: ignore[no-untyped-def]
        saved, outputs, width = [qkv], [], qkv.shape[1] // 3
        for part in _dense_parts(qkv, packing, num_heads):
            dense, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part.unbind(0))
            saved += [dense, lse]
            outputs.append(dense.transpose(1, 2).reshape(-1, width))
        if packing.total < len(qkv):
            outputs.append(qkv.new_zeros(len(qkv) - packing.total, width))
        ctx.save_for_backward(*saved)
        ctx.options = packing, num_heads
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        qkv, *saved = ctx.saved_tensors
        packing, num_heads = ctx.options
        dqkv, start = torch.empty_like(qkv, memory_format=torch.contiguous_format), 0
        dqkv[packing.total :].zero_()
        parts = zip(_dense_parts(qkv, packing, num_heads), _dense_parts(dqkv, packing, num_heads), strict=True)
        for number, (part, dpart) in enumerate(parts):
            _, count, _, length, head_dim = part.shape
            end = start + count * length
            dense_grad = grad[start:end].reshape(count, length, num_heads, head_dim).transpose(1, 2)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dense_grad, *part.unbind(0), *saved[2 * number : 2 * number + 2], 0.0, False
            )
            for place, value in zip(dpart, grads, strict=True):
                place.copy_(value)
            start = end
        return dqkv, None, None


torch.library.define(
    "vjepa_fast::attention_fwd",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, int num_heads, bool padded, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "vjepa_fast::attention_bwd",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, int num_heads, "
    "bool padded, str backend, bool deterministic) -> Tensor",
)


@torch.library.register_fake("vjepa_fast::attention_fwd")
def _fwd_outputs(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, padded: bool, backend: str
) -> tuple[Tensor, Tensor]:
    out = torch.empty((qkv.shape[0], qkv.shape[1] // 3), dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty((num_heads, qkv.shape[0]), dtype=torch.float32, device=qkv.device)


@torch.library.register_fake("vjepa_fast::attention_bwd")
def _bwd_output(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    padded: bool,
    backend: str,
    deterministic: bool,
) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [L, H, D] as views, in rows that the libraries can load 16 bytes at a time."""
    unit = 16 // qkv.element_size()
    if qkv.stride(1) != 1 or qkv.stride(0) % unit or qkv.stride(0) < qkv.shape[1] or qkv.data_ptr() % 16:
        qkv = qkv.clone(memory_format=torch.contiguous_format)
    # FlashAttention 2 declares that it changes its operands, which it does not. As `data` they count their versions for
    # themselves, and autograd sees no change in a tensor that somebody saved.
    q, k, v = qkv.data.view(len(qkv), 3, num_heads, -1).unbind(1)
    return q, k, v


def _loaded(backend: str) -> Adapter:
    found = adapter(backend)
    if isinstance(found, str):
        raise RuntimeError(f"attention back end {backend}: {found}")
    return found


def _attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, padded: bool, backend: str
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(qkv, num_heads)
    with torch.cuda.device_of(qkv):
        out, lse = _loaded(backend).forward(q, k, v, cu_seqlens, max_seqlen, q.shape[-1] ** -0.5)
    if out.shape != q.shape or lse.shape != (num_heads, len(q)):
        raise RuntimeError(
            f"attention back end {backend} returned shapes {list(out.shape)} and {list(lse.shape)}; "
            f"expected {list(q.shape)} and {[num_heads, len(q)]}"
        )
    out = out.reshape(len(qkv), -1).contiguous()
    if padded:
        zero_tail_(out, cu_seqlens)
    return out, lse.contiguous()


def _attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    padded: bool,
    backend: str,
    deterministic: bool,
) -> Tensor:
    q, k, v = _heads(qkv, num_heads)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _loaded(backend).backward(
            grad.contiguous().view(q.shape),
            q,
            k,
            v,
            out.view(q.shape),
            lse,
            cu_seqlens,
            max_seqlen,
            q.shape[-1] ** -0.5,
            *_heads(dqkv, num_heads),
            deterministic,
        )
    if padded:
        zero_tail_(dqkv, cu_seqlens)
    return dqkv


torch.library.impl("vjepa_fast::attention_fwd", ("cpu", "cuda"), _attention_fwd)
torch.library.impl("vjepa_fast::attention_bwd", ("cpu", "cuda"), _attention_bwd)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        padded: bool,
        backend: str,
        deterministic: bool,
    ) -> Tensor:
        options = max_seqlen, num_heads, padded, backend
        out, lse = torch.ops.vjepa_fast.attention_fwd(qkv, cu_seqlens, *options)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.options = *options, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        return torch.ops.vjepa_fast.attention_bwd(grad, *saved, *ctx.options), *[None] * 6


def _attend(qkv: Tensor, packing: Packing, num_heads: int, name: str, deterministic: bool) -> Tensor:
    """By a given back end."""
    if name == "sdpa":
        by_hand = qkv.device.type == "cpu" and type(qkv) in (Tensor, FakeTensor) and not is_compiling()
        # The switch holds for the CPU's kernel too.
        by_hand = by_hand and torch.backends.cuda.flash_sdp_enabled()
        if by_hand and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"):
            dense: Tensor = _SdpaCpu.apply(qkv, packing, num_heads)
            return dense
        return _sdpa(qkv, packing, num_heads)
    padded = packing.dynamic or packing.total < qkv.shape[0]
    out: Tensor = _Attention.apply(qkv, packing.cu_seqlens, packing.max_seqlen, num_heads, padded, name, deterministic)
    return out


@constant_result
def _traced_choice(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    backward: bool,
    deterministic: bool,
    dynamic: bool,
    requested: str | None,
) -> str:
    case = Case(torch.device(device), dtype, head_dim, num_heads, backward, deterministic, dynamic)
    return choice.without_measuring(case, requested)


def _within_backward() -> bool:
    """Whether the caller recomputes something for a backward pass, which is not the time to run another one."""
    return torch._C._current_graph_task_id() != -1


def select_backend(
    packing: Packing, num_heads: int, head_dim: int, dtype: torch.dtype, backward: bool, requested: str | None = None
) -> str:
    """The back end that `attention` takes, measured now if it has not been before.

    To be called before a region is compiled or a CUDA graph captured: there nothing can be measured, and what has not
    been by then is served by the first of torch's own two.

    Args:
        packing: lengths as they will be, on the device in question.
        num_heads: H.
        head_dim: D.
        dtype: of queries, keys and values.
        backward: whether there will be a backward pass.
        requested: as `backend` of `attention`.

    Raises:
        UserError: as `attention`.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    case = Case(packing.cu_seqlens.device, dtype, head_dim, num_heads, backward, deterministic, packing.dynamic)
    return choice.choose(case, packing.lengths, requested, _attend, attention_ref)


def attention(qkv: Tensor, packing: Packing, num_heads: int, backend: str | None = None) -> Tensor:
    """Softmax attention with scale head_dim ** -0.5.

    Args:
        qkv: [L, 3 * H * D], the output of one projection: queries, keys, values, each head by head.
        packing: where the sequences lie; L may exceed its total, see the module docstring.
        num_heads: H.
        backend: `auto` or None: by measurement; or `sdpa`, or one of BACKENDS of backends.py. The
            environment variable VJEPA_FAST_ATTENTION, of the same values, comes before it.

    Returns:
        [L, H * D] of qkv's dtype.

    Raises:
        ValueError: shapes that do not fit each other.
        UserError: a back end that is unknown, cannot serve these operands here, or computes something else.
    """
    length, width = qkv.shape[0], qkv.shape[-1] // 3
    if qkv.ndim != 2 or num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(f"qkv has shape {list(qkv.shape)}; expected [L, 3 * H * D] with H = {num_heads} heads")
    if packing.total > length and not packing.dynamic:
        raise ValueError(f"qkv has {length} rows; the packing's sequences have {packing.total}")
    head_dim = width // num_heads
    if not packing.max_seqlen or not length:
        # The gradient is zeros too, not absent.
        return qkv[:, :width].masked_fill(torch.ones((), dtype=torch.bool, device=qkv.device), 0)
    backward = torch.is_grad_enabled() and qkv.requires_grad
    deterministic = torch.are_deterministic_algorithms_enabled()
    if is_compiling():
        name = _traced_choice(
            str(qkv.device), qkv.dtype, head_dim, num_heads, backward, deterministic, packing.dynamic, backend
        )
    else:
        case = Case(qkv.device, qkv.dtype, head_dim, num_heads, backward, deterministic, packing.dynamic)
        if isinstance(qkv, FakeTensor):
            name = choice.for_fake(case, backend)
        elif is_capturing(qkv.device) or _within_backward():
            name = choice.without_measuring(case, backend)
        else:
            name = choice.choose(case, packing.lengths, backend, _attend, attention_ref)
    return _attend(qkv, packing, num_heads, name, deterministic)
