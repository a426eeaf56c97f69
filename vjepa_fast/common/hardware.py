"""Describes the machine."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from pathlib import Path


@cache
def cpu_name() -> str:
    """Model name of the processor, as the kernel gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
