"""The libraries that can compute packed attention: how each is found, what it can do, how it is called.

Nothing here imports a library or touches a GPU before it is asked for. A library's kernels are called below autograd,
with queries, keys and values as views of one buffer, so that all gradients are written into one buffer too; each call
is by name, after a look at the signature, so that a version with another one is refused and not called wrongly.

Legend: L tokens, H heads, D head width, S sequences.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from vjepa_fast.common.cache_dir import default_cache_dir

HALF = (torch.bfloat16, torch.float16)


class Unusable(Exception):
    """Why a library cannot be called."""


class Adapter(NamedTuple):
    """Calls of a library."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
    """(q, k, v [L, H, D], cu_seqlens, max_seqlen, scale) -> output [L, H, D], log-sum-exp fp32 [H, L]."""
    backward: Callable[..., None]
    """(grad, q, k, v, out [L, H, D], lse, cu_seqlens, max_seqlen, scale, dq, dk, dv, deterministic): the gradients are
    written into the views dq, dk, dv."""


@dataclass(frozen=True)
class Backend:
    """One line of the table of back ends."""

    name: str
    package: str
    """Name of the distribution whose version counts."""
    accepted: str
    """Versions of the package that are accepted."""
    load: Callable[[], Adapter]
    """Imports the library; raises Unusable or whatever goes wrong in the import."""
    majors: frozenset[int]
    """Compute capabilities, without the minor number."""
    deterministic: frozenset[int]
    """Compute capabilities whose backward gives the same bits in every run."""
    max_head_dim: int
    no_backward: frozenset[tuple[int, int]] = frozenset()
    """(Major compute capability, head dim) of backward kernels that do not compile."""
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dim_unit: int = 8

    @property
    def version(self) -> str | None:
        """Version of the installed package; None where it is not installed."""
        return installed_version(self.package)

    def missing(self) -> str | None:
        """Why the library cannot be used on any GPU; None: it can."""
        version = self.version
        if version is None:
            return f"{self.package} is not installed"
        if not SpecifierSet(self.accepted).contains(version, prereleases=True):
            return f"{self.package} {version} is installed, but {self.accepted} is needed"
        loaded = adapter(self.name)
        return loaded if isinstance(loaded, str) else None

    def refuses(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, backward: bool, deterministic: bool
    ) -> str | None:
        """Why it cannot serve these operands; None: it can."""
        if device.type != "cuda":
            return f"it needs a CUDA device, the tensors are on {device.type}"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch finds no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in self.majors:
            known = ", ".join(f"{one}.x" for one in sorted(self.majors))
            return f"it serves compute capability {known}, the device has {major}.{minor}"
        if dtype not in self.dtypes:
            return f"it serves {_names(self.dtypes)}, not {_names([dtype])}"
        if head_dim % self.head_dim_unit or head_dim > self.max_head_dim:
            return (
                f"it serves head dims up to {self.max_head_dim} that are multiples of {self.head_dim_unit}, not "
                f"{head_dim}"
            )
        if backward and (major, head_dim) in self.no_backward:
            return f"its backward does not compile for head dim {head_dim} on compute capability {major}.x"
        if backward and deterministic and major not in self.deterministic:
            return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
        return self.missing()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def installed_version(package: str) -> str | None:
    """Version of a distribution; None: not installed."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def adapter(name: str) -> Adapter | str:
    """How to call a back end, or why it does not load. The library is imported at the first call."""
    try:
        return BACKENDS[name].load()
    except Unusable as error:
        return str(error)
    except Exception as error:  # A broken wheel may raise anything while it is imported.
        text = str(error).splitlines()
        return f"its import fails: {type(error).__name__}: {text[0] if text else ''}"


def _signature(function: Any) -> dict[str, bool]:
    """Parameter names, and whether each must be given."""
    if isinstance(function, torch._ops.OpOverload):
        return {argument.name: not argument.has_default_value() for argument in function._schema.arguments}
    # torch.library.custom_op hides the function that it was given.
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters.values()
    return {one.name: one.default is inspect.Parameter.empty for one in parameters}


def _checked(function: Any, called: str, needed: Iterable[str], neutral: dict[str, Any]) -> Callable[..., Any]:
    """The function, with neutral values for parameters that it demands and we have no use for.

    Raises:
        Unusable: a parameter that we pass is unknown to it, or it demands one that is unknown to us.
    """
    found = _signature(function)
    absent = [name for name in needed if name not in found]
    strange = [name for name, required in found.items() if required and name not in neutral and name not in needed]
    if absent or strange:
        raise Unusable(
            f"{called} has another signature than those known here: "
            + " and ".join([f"no {name}" for name in absent] + [f"a {name} that must be given" for name in strange])
        )
    fixed = {name: value for name, value in neutral.items() if found.get(name)}

    def call(**given: Any) -> Any:
        return function(**given, **fixed)

    return call


_NEUTRAL = {
    "dropout_p": 0.0,
    "causal": False,
    "is_causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
}


def _flash_adapter(module: str, forward: str, backward: str, needs_lse: bool = False) -> Adapter:
    """The call that FlashAttention 2, 3 and 4 have in common."""
    library = importlib.import_module(module)
    operands = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"]
    options = {"return_lse": True} if needs_lse else {}
    run_forward = _checked(getattr(library, forward), forward, [*operands, *options], _NEUTRAL)
    function = getattr(library, backward)
    lse_name = "softmax_lse" if "softmax_lse" in _signature(function) else "lse"
    run_backward = _checked(
        function, backward, [*operands, "dout", "out", lse_name, "dq", "dk", "dv", "deterministic"], _NEUTRAL
    )

    def fwd(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = run_forward(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            **options,
        )
        return out, lse

    def bwd(
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
        deterministic: bool,
    ) -> None:
        run_backward(
            dout=grad,
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=deterministic,
            **{lse_name: lse},
        )

    return Adapter(fwd, bwd)


def _load_fa4() -> Adapter:
    # Its kernels are compiled at their first call, seconds each; without this every process would do so again. A
    # folder of the user's own, as compiled code is loaded from it.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(default_cache_dir() / "flash_attention_4"))
    return _flash_adapter("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd", needs_lse=True)


def _load_fa3() -> Adapter:
    return _flash_adapter("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward")


def _load_fa2() -> Adapter:
    return _flash_adapter(
        "flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
    )


def _load_xformers() -> Adapter:
    fmha = importlib.import_module("xformers.ops.fmha")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    if not fmha.flash.FwOp.is_available():
        raise Unusable("its FlashAttention operators are not available with this build of torch")
    info = _checked(bias._SeqLenInfo, "_SeqLenInfo", ["seqstart", "max_seqlen", "min_seqlen", "seqstart_py"], {})

    def mask(cu: Tensor, longest: int, total: int) -> Any:
        # The FlashAttention operators read the boundaries from the device; the list is for other ones.
        sequences = info(seqstart=cu, max_seqlen=longest, min_seqlen=0, seqstart_py=[0, total])
        return bias.BlockDiagonalMask(q_seqinfo=sequences, k_seqinfo=sequences)

    def fwd(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            q[None], k[None], v[None], attn_bias=mask(cu, longest, len(q)), scale=scale, op=fmha.flash.FwOp
        )
        return out[0], lse[0]

    def bwd(
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
        deterministic: bool,
    ) -> None:
        found = fmha.memory_efficient_attention_backward(
            grad[None],
            out[None],
            lse[None],
            q[None],
            k[None],
            v[None],
            attn_bias=mask(cu, longest, len(q)),
            scale=scale,
            op=fmha.flash.BwOp,
        )
        for target, value in zip((dq, dk, dv), found, strict=True):
            target.copy_(value[0])

    return Adapter(fwd, bwd)


def _load_varlen() -> Adapter:
    importlib.import_module("torch.nn.attention.varlen")
    operands = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale"]
    forward = _checked(
        torch.ops.torch_attn._varlen_attn.default, "torch_attn::_varlen_attn", operands, {"is_causal": False}
    )
    backward = _checked(
        torch.ops.torch_attn._varlen_attn_backward.default,
        "torch_attn::_varlen_attn_backward",
        [*operands, "grad_out", "out", "lse", "is_causal", "rng_state"],
        {},
    )

    def fwd(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = forward(
            query=q, key=k, value=v, cu_seq_q=cu, cu_seq_k=cu, max_q=longest, max_k=longest, scale=scale
        )
        return out, lse

    def bwd(
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
        deterministic: bool,
    ) -> None:
        # Of dropout, which there is none of. Whether the kernel is deterministic is torch's own switch.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        found = backward(
            grad_out=grad,
            query=q,
            key=k,
            value=v,
            out=out,
            lse=lse,
            cu_seq_q=cu,
            cu_seq_k=cu,
            max_q=longest,
            max_k=longest,
            is_causal=False,
            rng_state=state,
            scale=scale,
        )
        for target, value in zip((dq, dk, dv), found, strict=True):
            target.copy_(value)

    return Adapter(fwd, bwd)


def _majors(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


# FlashAttention 4 returns more than two values since 4.0.0b19, and takes python ints; FlashAttention 2 has one form of
# return value since 2.7. Where neither measurement nor choice is possible, the first usable one of UNMEASURED serves.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "fa4",
            "flash-attn-4",
            ">=4.0.0b19,<5",
            _load_fa4,
            _majors(9, 10, 11, 12),
            _majors(9, 10, 11),
            128,
            frozenset({(9, 104), (9, 112)}),
        ),
        Backend("fa3", "flash_attn_3", ">=3.0.0b1,<4", _load_fa3, _majors(9), _majors(9), 256),
        Backend("fa2", "flash-attn", ">=2.7,<3", _load_fa2, _majors(8, 9, 10, 12), _majors(8, 9, 10, 12), 256),
        Backend("varlen", "torch", ">=2.11", _load_varlen, _majors(8, 9, 10, 11, 12), _majors(8, 9, 10, 11, 12), 256),
        Backend("xformers", "xformers", ">=0.0.30", _load_xformers, _majors(8, 9, 10), _majors(), 256),
    )
}
UNMEASURED = ("varlen", "sdpa")
NAMES = (*BACKENDS, "sdpa")
"""`sdpa` is torch's scaled_dot_product_attention on runs of equal length; it serves everything, everywhere."""
