"""Documented names of `vjepa_fast.interop`, which live in checkpoints/ and swapping/. Loaded on first use."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name not in ("huggingface", "meta"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
