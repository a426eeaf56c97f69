"""Attention libraries in plain PyTorch: the real names, signatures, shapes and demands, on any device.

Rows behind the last sequence hold NaN in every result, as uninitialised memory may. Backward passes use the output and
the log-sum-exp that they are given, so that a wrong one shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.attention.plain import plain_backward, plain_forward
from vjepa_fast.common import cache_dir
from vjepa_fast.ops.attention import backends, choice

VERSIONS = {"flash-attn-4": "4.0.0b36", "flash_attn_3": "3.0.0", "flash-attn": "2.8.3", "xformers": "0.0.35"}


def _fa4() -> dict[str, Any]:
    def _flash_attn_fwd(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        softcap=None,
        window_size_left=None,
        window_size_right=None,
        learnable_sink=None,
        tile_mn=None,
        num_threads=384,
        num_splits=1,
        return_lse=False,
        out=None,
        lse=None,
    ):
        assert max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k and not causal and return_lse
        return *plain_forward(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), None, None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
        dlse=None,
    ):
        plain_backward(dout, q, k, v, out, lse, cu_seqlens_q, max_seqlen_q, softmax_scale, dq, dk, dv)
        return dq, dk, dv

    return {"flash_attn.cute.interface": {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}}


def _fa3() -> dict[str, Any]:
    def _flash_attn_forward(
        q,
        k,
        v,
        k_new=None,
        v_new=None,
        qv=None,
        out_=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        cu_seqlens_k_new=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        num_splits=1,
        sm_margin=0,
    ):
        return *plain_forward(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        plain_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, softmax_scale, dq, dk, dv)
        return torch.empty(0)

    return {
        "flash_attn_interface": {
            "_flash_attn_forward": _flash_attn_forward,
            "_flash_attn_backward": _flash_attn_backward,
        }
    }


# As custom operators, like the real ones; registered once, as a name can be.
@torch.library.custom_op("stand_in::_flash_attn_varlen_forward", mutates_args=("q", "k", "v"))
def _fa2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dropout_p == 0 and not causal
    out, lse = plain_forward(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
    return out, lse, torch.empty(0), torch.empty(0)


@torch.library.custom_op("stand_in::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _fa2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    assert dq is not None and dk is not None and dv is not None
    assert (window_size_left, window_size_right, softcap, dropout_p, causal) == (-1, -1, 0.0, 0.0, False)
    plain_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, softmax_scale, dq, dk, dv)
    return torch.empty(0)


def _fa2() -> dict[str, Any]:
    return {
        "flash_attn.flash_attn_interface": {
            "_flash_attn_varlen_forward": _fa2_forward,
            "_flash_attn_varlen_backward": _fa2_backward,
        }
    }


def _xformers() -> dict[str, Any]:
    @dataclass
    class _SeqLenInfo:
        seqstart: Tensor
        max_seqlen: int
        min_seqlen: int
        seqstart_py: list[int]

    @dataclass
    class BlockDiagonalMask:
        q_seqinfo: _SeqLenInfo
        k_seqinfo: _SeqLenInfo
        _batch_sizes: Any = None

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert query.ndim == 4 and len(query) == 1 and attn_bias.k_seqinfo.seqstart_py[-1] == query.shape[1]
        where = attn_bias.q_seqinfo
        out, lse = plain_forward(query[0], key[0], value[0], where.seqstart, where.max_seqlen, scale)
        return out[None], lse[None]

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        where = attn_bias.q_seqinfo
        found = [torch.empty_like(x[0]) for x in (query, key, value)]
        plain_backward(
            grad[0], query[0], key[0], value[0], output[0], lse[0], where.seqstart, where.max_seqlen, scale, *found
        )
        return tuple(x[None] for x in found)

    operator = SimpleNamespace(is_available=lambda: True)
    return {
        "xformers.ops.fmha": {
            "flash": SimpleNamespace(FwOp=operator, BwOp=operator),
            "memory_efficient_attention_forward_requires_grad": memory_efficient_attention_forward_requires_grad,
            "memory_efficient_attention_backward": memory_efficient_attention_backward,
        },
        "xformers.ops.fmha.attn_bias": {"_SeqLenInfo": _SeqLenInfo, "BlockDiagonalMask": BlockDiagonalMask},
    }


def _aten_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    out, lse = plain_forward(query, key, value, cum_seq_q, max_q, scale)
    nothing = torch.empty(0)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), nothing


def _aten_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    found = [torch.empty_like(x) for x in (query, key, value)]
    plain_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, max_q, scale, *found)
    return tuple(found)


MODULES = {"fa4": _fa4, "fa3": _fa3, "fa2": _fa2, "xformers": _xformers}


@contextmanager
def aten_kernels() -> Iterator[None]:
    """The kernels under torch's varlen_attn, which has none for the CPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _aten_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_backward, "CPU")
        yield


def forget() -> None:
    """What this process knows of back ends."""
    backends.adapter.cache_clear()
    choice._chosen.clear()
    choice._checked.clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **changed: Any) -> None:
    """Pretend that a library is installed and the CPU a device that it serves.

    Args:
        changed: other contents of its first module; None: not there.
    """
    modules = MODULES[name]()
    for number, (path, contents) in enumerate(modules.items()):
        module = ModuleType(path)
        for key, value in {**contents, **(changed if number == 0 else {})}.items():
            if value is not None:
                setattr(module, key, value)
        monkeypatch.setitem(sys.modules, path, module)
        parents = {path[:end] for end, letter in enumerate(path) if letter == "."}
        for parent in parents - set(modules):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))


@contextmanager
def only(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], cache: Any) -> Iterator[None]:
    """These back ends serve the CPU, as stand-ins; choices are kept in the folder `cache`."""
    forget()
    versions = {backends.BACKENDS[name].package: VERSIONS.get(backends.BACKENDS[name].package) for name in names}
    versions["torch"] = torch.__version__
    monkeypatch.setattr(backends, "installed_version", versions.get)
    monkeypatch.setattr(cache_dir, "default_cache_dir", lambda: cache)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(
        backends.Backend, "refuses", lambda self, *_: self.missing() if self.name in names else "not in this test"
    )
    for name in names:
        if name in MODULES:
            install(monkeypatch, name)
    with aten_kernels():
        yield
    forget()
