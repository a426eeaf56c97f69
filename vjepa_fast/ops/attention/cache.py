"""Caches the chosen attention back ends in a file of the user's cache folder.

A file that is broken, foreign or of another version counts as empty and is written anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_fast.common import cache_dir

_FORMAT = 2
"""Of the file and of the way of measuring."""


@dataclass(frozen=True)
class Choice:
    """A back end and what it was chosen by."""

    name: str
    ms: dict[str, float]
    """Medians of those that were timed; empty: it was the only candidate."""
    dropped: dict[str, str]
    """Back ends that failed, and how."""


def cache_file() -> Path:
    """Where choices are kept."""
    return cache_dir.default_cache_dir() / "attention.json"


def read() -> dict[str, Choice]:
    """What was measured before, by key."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            return {}
        return {key: _parse(entry) for key, entry in found["choices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _parse(entry: dict[str, Any]) -> Choice:
    ms = {str(name): float(value) for name, value in entry["ms"].items()}
    return Choice(str(entry["backend"]), ms, {str(name): str(why) for name, why in entry["dropped"].items()})


def store(key: str, measured: Choice, usable: Sequence[str]) -> Choice:
    """Adds a choice to the file, unless another process was first: then the result is its choice.

    Raises:
        OSError: the folder cannot be written.
    """
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        # Elsewhere than on POSIX a choice that is lost to a race is measured again.
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        known = read()
        if key in known and known[key].name in usable and known[key].name not in measured.dropped:
            return known[key]
        known[key] = measured
        entries = {name: {"backend": one.name, "ms": one.ms, "dropped": one.dropped} for name, one in known.items()}
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as out:
                json.dump({"format": _FORMAT, "choices": entries}, out, indent=1)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    return measured
