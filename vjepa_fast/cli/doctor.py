"""`vjepa-fast doctor`: reports what is installed, what is used, and why something is not."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Literal

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vjepa_fast import __version__
from vjepa_fast.cli.console import exit_codes
from vjepa_fast.common.errors import UserError

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "note", "problem"]

_CODECS = ("h264", "hevc", "vp9", "av1", "mjpeg")
_OPTIONAL = ("triton", "transformers", "tensorboard")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    """`problem`: something is broken or will fail; `note`: works, but not as well as it could."""
    subject: str
    text: str


def doctor() -> None:
    """Say what is installed, which kernels are used, and why others are not. Exit code 1 if something is broken."""
    with exit_codes():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        typer.echo(
            f"vjepa-fast {__version__}, Python {platform.python_version()}, {platform.system()} "
            f"{platform.machine()}, {cores} CPU cores, {sys.prefix}"
        )
        broken = False
        for finding in examine():
            typer.echo(f"{finding.level:8} {finding.subject:10} {finding.text}")
            broken |= finding.level == "problem"
    raise typer.Exit(1 if broken else 0)


def examine() -> Iterator[Finding]:
    """All findings, in the order in which things depend on each other."""
    torch_works = False
    for finding in _torch():
        torch_works |= finding.level != "problem"
        yield finding
    if not torch_works:
        return
    yield from _extension()
    yield from _masks()
    yield from _gpus()
    yield from _attention()
    yield _video()
    yield _dali()
    yield from _optional()


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("problem", "torch", f"does not import: {error}")
        return
    accepted = _accepted_torch()
    text = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if accepted is None or SpecifierSet(accepted).contains(torch.__version__, prereleases=True):
        yield Finding("ok", "torch", text)
    else:
        yield Finding("note", "torch", f"{text}; tried with {accepted} only")


def _accepted_torch() -> str | None:
    """Versions that the installed package asks for; None where it runs from a folder."""
    try:
        wanted = [Requirement(text) for text in requires("vjepa-fast") or ()]
    except PackageNotFoundError:
        return None
    return next(str(requirement.specifier) for requirement in wanted if requirement.name == "torch")


def _extension() -> Iterator[Finding]:
    from vjepa_fast.common import extension

    found = extension.load()
    if found.path is None:
        missing = not extension.LIBRARY.exists() or not found.wanted
        yield Finding("note" if missing else "problem", "extension", f"not loaded: {found.reason}")
        return
    architectures = ", ".join(f"sm_{name}" for name in found.cuda_architectures)
    kernels = f"C++ and CUDA kernels ({architectures})" if architectures else "C++ kernels only, no nvcc at build time"
    yield Finding("ok", "extension", f"{kernels}, built with torch {found.built_with}, loaded from {found.path}")


def _masks() -> Iterator[Finding]:
    import numpy as np
    import torch

    from vjepa_fast.config.schema import MaskSpec
    from vjepa_fast.masking import mask_sample
    from vjepa_fast.masking.mask_rules import BlockSpec

    grid, ids = (8, 16, 16), np.arange(24)
    masks = MaskSpec(num_blocks=8, spatial_scale=(0.15, 0.15)), MaskSpec(num_blocks=2, spatial_scale=(0.7, 0.7))
    specs = [BlockSpec.from_config(mask, grid) for mask in masks]
    expected = mask_sample.masks_ref(specs, grid, ids, ids, seed=1, step=2, group_size=-1)
    wanted = [torch.from_numpy(np.nonzero(kind.reshape(-1, kind.shape[-1]))[1]).int() for kind in expected]
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    # Why an operator is not used is said in a warning, once a process.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if mask_sample.operators() is None:
            yield Finding("note", "masks", "drawn by NumPy on the host: the same ones, but slower")
            return
        usable = {device: mask_sample.runs_on(device) for device in devices}
    for device in devices:
        if not usable[device]:
            reasons = [str(one.message) for one in said] or ["the extension has no kernels for it"]
            yield Finding("note", "masks", f"{device}: drawn on the host and copied: {'; '.join(reasons)}")
            continue
        drawn = mask_sample.mask_sample(specs, grid, ids, ids, seed=1, step=2, group_size=-1, device=device)
        same = all(torch.equal(a.cpu(), b) for a, b in zip((drawn.context_ids, drawn.target_ids), wanted, strict=True))
        yield Finding(
            "ok" if same else "problem",
            "masks",
            f"{device}: drawn by the extension, "
            + (
                "equal to the definition"
                if same
                else "NOT equal to the definition; set VJEPA_FAST_EXT=0 and report this with the lines above"
            ),
        )


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.backends.cuda.is_built():
        yield Finding("note", "GPU", "not used: this torch is built without CUDA")
        return
    if not torch.cuda.is_available():
        yield Finding(
            "note", "GPU", f"none that torch (CUDA {torch.version.cuda}) can use; nvidia-smi shows what the driver sees"
        )
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding(
            "ok",
            "GPU",
            f"cuda:{number} {about.name}, sm_{about.major}{about.minor}, "
            f"{about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        )


def _first_gpu() -> torch.device:
    import torch

    return torch.device("cuda", 0)


def _attention() -> Iterator[Finding]:
    """Whether each back end can be used for bf16 with heads of 64 on the first GPU, and what is chosen."""
    import torch

    from vjepa_fast.ops.attention import cache, choice
    from vjepa_fast.ops.attention import op as attention
    from vjepa_fast.ops.attention.backends import BACKENDS

    device = _first_gpu()
    case = choice.Case(device, torch.bfloat16, head_dim=64, num_heads=4, backward=True, deterministic=False)
    on_gpu = torch.cuda.is_available()
    for backend in BACKENDS.values():
        why = backend.missing() if backend.version is None else choice.refusals(case)[backend.name]
        if why is None:
            why = choice.check(case, backend.name, attention._attend, attention.attention_ref)
        usable = "usable, equal to the definition" if why is None else f"not used: {why}"
        version = "" if backend.version is None else f" ({backend.package} {backend.version})"
        yield Finding("note" if why and on_gpu else "ok", "attention", f"{backend.name}{version}: {usable}")
    try:
        name, where = choice.demand(None)
    except UserError as error:
        yield Finding("problem", "attention", str(error))
        return
    if name != "auto":
        why = choice.refusals(case)[name]
        yield Finding(
            "problem" if why else "ok",
            "attention",
            f"{where} cannot be used: {why}" if why else f"chosen: {name}, by {where}",
        )
    elif not on_gpu:
        yield Finding("ok", "attention", "chosen: sdpa, the only candidate on the CPU")
    else:
        place = choice.stamp(device)
        found = {key: one for key, one in cache.read().items() if key.startswith(place)}
        for key, one in found.items():
            times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(one.ms.items(), key=lambda item: item[1]))
            lost = "".join(f"; {name}: {why}" for name, why in one.dropped.items())
            yield Finding(
                "ok", "attention", f"chosen: {one.name} for{key.removeprefix(place + ';')}, as measured: {times}{lost}"
            )
        others = "all others by" if found else "by"
        yield Finding(
            "ok", "attention", f"chosen: {others} a short measurement at the first use, kept in {cache.cache_file()}"
        )


def _video() -> Finding:
    import av

    missing = [name for name in _CODECS if not _can_decode(name)]
    text = f"PyAV {av.__version__}, decodes {', '.join(name for name in _CODECS if name not in missing)}"
    if missing:
        return Finding("note", "video", f"{text}, but not {', '.join(missing)}")
    return Finding("ok", "video", text)


def _dali() -> Finding:
    import torch

    from vjepa_fast.data.decode.choose_backend import choose
    from vjepa_fast.data.decode.dali import missing

    device = _first_gpu() if torch.cuda.is_available() else torch.device("cpu")
    why_not = missing(device)
    if why_not is None:
        import nvidia.dali

        codecs = "h264, hevc, vp9 and JPEG on the GPU" if device.type == "cuda" else "vp9, mjpeg and JPEG on the CPU"
        found = f"{nvidia.dali.__version__}, decodes {codecs}"
    else:
        found = f"not used: {why_not}"
    return Finding(
        "note" if why_not and device.type == "cuda" else "ok",
        "DALI",
        f"{found}; data.backend=auto is {choose('auto', device)}",
    )


def _can_decode(name: str) -> bool:
    import av.codec

    try:
        av.codec.Codec(name, "r")
    except ValueError:
        return False
    return True


def _optional() -> Iterator[Finding]:
    found = []
    for name in _OPTIONAL:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    yield Finding("ok", "installed", ", ".join(found) if found else "none of the optional packages")
