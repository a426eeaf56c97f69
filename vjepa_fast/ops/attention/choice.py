"""Which attention back end serves a case: by demand, by what an earlier run measured, or by measuring now.

The order: VJEPA_FAST_ATTENTION, then the caller's demand (config `model.attention`), then `auto`. `auto` times every
back end that can serve the case, forward or forward and backward, on the first lengths that it meets; the fastest is
kept in memory and in a file of the user's cache folder, under a key with everything that the time depends on. Before a
back end may win, or is used on demand, its results on small data are compared with the definition in fp64; one that is
further from it than plain PyTorch of the same dtype allows is dropped, and a warning says so.

Several processes may choose differently without harm: nothing in attention communicates, gradients are averaged
afterwards, and so all replicas keep the same weights. Those that share a cache folder agree even so, as the first
result that is written there is the one that all take.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError
from vjepa_fast.ops.attention import cache
from vjepa_fast.ops.attention.backends import BACKENDS, NAMES, UNMEASURED
from vjepa_fast.ops.attention.cache import Choice
from vjepa_fast.ops.packing import Packing

Attend = Callable[[Tensor, Packing, int, str, bool], Tensor]
Reference = Callable[[Tensor, Packing, int], Tensor]
T = TypeVar("T")

VARIABLE = "VJEPA_FAST_ATTENTION"
# A back end further down the table must be faster by this much, or noise would decide.
_MARGIN = 1.03
_MAX_TOKENS = 16384
_BUSY_CYCLES = 10_000_000
"""About five milliseconds of a GPU."""
# Of the check: a single token, an empty sequence, a part of a tile, several. With nothing longer than a tile (192 rows)
# FlashAttention 4 would compile kernels of their own, which are not those that training runs.
_CHECKED_LENGTHS = (1, 77, 0, 400, 64)
_ROWS_BEHIND = 5


@dataclass(frozen=True)
class Case:
    """What a choice is made for."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    backward: bool
    deterministic: bool
    dynamic: bool = False
    """Only the device knows the lengths."""

    def describe(self) -> str:
        """In words; the part of a key that says which operands."""
        words = [
            str(self.dtype).removeprefix("torch."),
            f"head dim {self.head_dim}",
            f"{self.num_heads} heads",
            "with backward" if self.backward else "forward only",
        ]
        return ", ".join(words + ["deterministic"] * self.deterministic + ["dynamic lengths"] * self.dynamic)


_chosen: dict[tuple[Case, int], Choice] = {}
_checked: dict[tuple[Case, str], str | None] = {}


def demand(requested: str | None) -> tuple[str, str]:
    """A name of NAMES or `auto`, and where it was said.

    Raises:
        UserError: an unknown name.
    """
    said = os.environ.get(VARIABLE)
    name, where = (said, f"{VARIABLE}={said}") if said else (requested or "auto", f"model.attention={requested}")
    if name != "auto" and name not in NAMES:
        raise UserError(f"{where} is not an attention back end; expected auto, {', '.join(NAMES)}")
    return name, where


def refusals(case: Case) -> dict[str, str | None]:
    """For every back end why it cannot serve the case; None: it can."""
    found = {
        name: backend.refuses(case.device, case.dtype, case.head_dim, case.backward, case.deterministic)
        for name, backend in BACKENDS.items()
    }
    return {**found, "sdpa": "it needs lengths that the host knows" if case.dynamic else None}


def _usable(case: Case) -> list[str]:
    usable = [name for name, why in refusals(case).items() if why is None]
    if not usable:
        raise UserError("no attention back end can serve lengths that only the device knows: " + _reasons(case))
    return usable


def _reasons(case: Case) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refusals(case).items() if why is not None)


def _bucket(max_seqlen: int) -> int:
    """The next power of two."""
    return 1 << (max(max_seqlen, 1) - 1).bit_length()


def _unmet(case: Case, name: str, where: str, why: str) -> UserError:
    others = [other for other, reason in refusals(case).items() if reason is None and other != name]
    usable = f"use auto, {', '.join(others)}" if others else "nothing else can serve it either"
    return UserError(f"{where} cannot be used for {case.describe()}: {why}; {usable}")


def refusal_of(case: Case, requested: str | None) -> str | None:
    """Why attention cannot serve the case, as the end of a sentence; None: it can.

    Raises:
        UserError: an unknown name.
    """
    name, where = demand(requested)
    found = refusals(case)
    if name != "auto":
        return None if found[name] is None else f"{where} cannot serve {case.describe()}: {found[name]}"
    return None if None in found.values() else f"no attention back end serves {case.describe()}: {_reasons(case)}"


def _demanded(case: Case, name: str, where: str) -> str:
    why = refusals(case)[name]
    if why is not None:
        raise _unmet(case, name, where, why)
    return name


def for_fake(case: Case, requested: str | None) -> str:
    """For tensors without data, which may stand for a device that is not there: a demand is taken at its word."""
    name, _ = demand(requested)
    return name if name != "auto" else without_measuring(case, requested)


def without_measuring(case: Case, requested: str | None) -> str:
    """For tracing, capturing and backward passes: a demand, else the choice for the longest sequences, else torch's."""
    name, where = demand(requested)
    if name != "auto":
        return _demanded(case, name, where)
    measured = [(bucket, choice.name) for (known, bucket), choice in _chosen.items() if known == case]
    if measured:
        return max(measured)[1]
    usable = _usable(case)
    return next((name for name in UNMEASURED if name in usable), usable[0])


def choose(case: Case, lengths: Sequence[int], requested: str | None, attend: Attend, reference: Reference) -> str:
    """The name of a back end, for real operands outside of tracing and capturing.

    Args:
        case: what for.
        lengths: of the sequences, not all zero.
        requested: the caller's demand.
        attend: runs a back end: (qkv, packing, num_heads, name, deterministic).
        reference: the definition: (qkv, packing, num_heads).

    Raises:
        UserError: a demand that is unknown, cannot be met here, or whose results are wrong.
    """
    name, where = demand(requested)
    if name == "auto":
        key = (case, _bucket(max(lengths)))
        if key not in _chosen:
            _chosen[key] = _remembered_or_measured(case, key[1], lengths, attend, reference)
        return _chosen[key].name
    if (case, name) not in _checked:
        _demanded(case, name, where)
        if name == "sdpa":
            _checked[case, name] = None
        else:
            _alone(case.device, lambda: check(case, name, attend, reference))
    wrong = _checked[case, name]
    if wrong is not None:
        raise _unmet(case, name, where, wrong)
    return name


def _alone(device: torch.device, call: Callable[[], T]) -> T:
    """The result of a call in a thread of its own, with this device as the current one.

    The caller may have thread-local state (activation checkpointing, autocast, grad mode, hooks); a fresh thread has
    none of it.
    """

    def run() -> T:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _remembered_or_measured(
    case: Case, bucket: int, lengths: Sequence[int], attend: Attend, reference: Reference
) -> Choice:
    usable = _usable(case)
    if len(usable) == 1:
        return Choice(usable[0], {}, {})
    key = cache_key(case, bucket)
    found = cache.read().get(key)
    if found is not None and found.name in usable:
        return found
    measured = _alone(case.device, lambda: _measure(case, usable, lengths, attend, reference))
    for name, why in measured.dropped.items():
        warnings.warn(f"attention back end {name} is not used for {case.describe()}: {why}", stacklevel=2)
    # A full or read-only disk costs time, not the run.
    with contextlib.suppress(OSError):
        return cache.store(key, measured, usable)
    return measured


def _generator(device: torch.device) -> torch.Generator:
    """A generator for measuring alone, which must not change what the run draws."""
    return torch.Generator(device).manual_seed(0)


def _packing(lengths: Sequence[int], device: torch.device, dynamic: bool) -> Packing:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packing(tuple(lengths), ends.to(device), dynamic)


def _run(case: Case, qkv: Tensor, grad: Tensor, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output, and the gradient of the operand where the case has a backward."""
    leaf = qkv.detach().requires_grad_(case.backward)
    with torch.set_grad_enabled(case.backward):
        out = compute(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad)] if case.backward else [out]


def check(case: Case, name: str, attend: Attend, reference: Reference) -> str | None:
    """What is wrong with a back end's results; None: nothing. Asked once a process and case.

    The error against fp64 is at most three times that of the definition in the same dtype, plus two units in the last
    place of the largest value: probabilities and their gradients are rounded to that dtype in either.
    """
    if (case, name) not in _checked:
        try:
            _checked[case, name] = _compare(case, name, attend, reference)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Compilers, drivers and libraries have no error in common.
            text = str(error).splitlines()
            _checked[case, name] = f"it fails: {type(error).__name__}: {text[0] if text else ''}"
    return _checked[case, name]


def _compare(case: Case, name: str, attend: Attend, reference: Reference) -> str | None:
    packing = _packing(_CHECKED_LENGTHS, case.device, case.dynamic)
    width = case.num_heads * case.head_dim
    drawn = torch.randn(packing.total + _ROWS_BEHIND, 4 * width, generator=_generator(torch.device("cpu")))
    qkv, grad = drawn.to(case.device, case.dtype).split([3 * width, width], dim=1)

    def by_reference(x: Tensor) -> Tensor:
        return reference(x, packing, case.num_heads)

    truth = _run(case, qkv.double(), grad.double(), by_reference)
    plain = _run(case, qkv, grad, by_reference)
    ours = _run(case, qkv, grad, lambda x: attend(x, packing, case.num_heads, name, case.deterministic))
    for what, exact, ordinary, found in zip(("output", "gradient"), truth, plain, ours, strict=False):
        error, usual = (float((x.double() - exact).abs().max()) for x in (found, ordinary))
        limit = 3 * usual + 2 * torch.finfo(case.dtype).eps * float(exact.abs().max())
        # Not a number is no smaller than anything.
        if not error <= limit:
            return f"its {what} is wrong: error {error:.3g} on small data, at most {limit:.3g} is rounding"
    return None


def time_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls on the GPU, after two that are not counted.

    The stream is kept busy before each, so that the launches do not count: the data is a part of a step's only, and
    those of FlashAttention 4, which is written in Python, would take longer than its kernels on it.
    """
    times = []
    for counted in (False, False, True, True, True, True, True):
        if counted:
            torch.cuda._sleep(_BUSY_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        if counted:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _measure(case: Case, usable: Sequence[str], lengths: Sequence[int], attend: Attend, reference: Reference) -> Choice:
    """Times the usable back ends on the first sequences, random data, up to _MAX_TOKENS tokens."""
    count, total = 1, lengths[0]
    while count < len(lengths) and total + lengths[count] <= _MAX_TOKENS:
        total += lengths[count]
        count += 1
    packing = _packing(lengths[:count] if total else (max(lengths),), case.device, case.dynamic)
    width = case.num_heads * case.head_dim
    drawn = torch.randn(packing.total, 4 * width, generator=_generator(case.device), device=case.device)
    qkv, grad = (part.contiguous() for part in drawn.to(case.dtype).split([3 * width, width], dim=1))
    ms: dict[str, float] = {}
    dropped: dict[str, str] = {}
    for name in usable:
        why = check(case, name, attend, reference) if name != "sdpa" else None
        if why is not None:
            dropped[name] = why
            continue

        def call(name: str = name) -> object:
            return _run(case, qkv, grad, lambda x: attend(x, packing, case.num_heads, name, case.deterministic))

        ms[name] = time_ms(call, case.device)
    if not ms:
        raise UserError(
            f"no attention back end works for {case.describe()}: "
            + "; ".join(f"{name}: {why}" for name, why in dropped.items())
        )
    fastest = min(ms.values())
    return Choice(next(name for name in NAMES if ms.get(name, math.inf) <= _MARGIN * fastest), ms, dropped)


def stamp(device: torch.device) -> str:
    """GPU and versions, the part of a key that says where."""
    from vjepa_fast import __version__

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = sorted({backend.package: backend.version for backend in BACKENDS.values()}.items())
    versions = ", ".join(f"{name} {version}" for name, version in packages if version)
    return f"{gpu}; {versions}, CUDA {torch.version.cuda}, vjepa-fast {__version__}"


def cache_key(case: Case, bucket: int) -> str:
    """Everything that a measurement depends on."""
    return f"{stamp(case.device)}; {case.describe()}, sequences up to {bucket}"
