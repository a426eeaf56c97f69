"""Finds and loads the compiled operators of csrc/ once, on first use, and reports the outcome.

One shared library, `_C.so` in the package, holds the C++ and the CUDA kernels behind PyTorch's stable ABI, so that it
loads in any PyTorch from 2.10 on, with and without CUDA. Everything works without it; `load().reason` says why it is
not used. VJEPA_FAST_EXT=0 ignores it.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import vjepa_fast

LIBRARY = Path(__file__).parents[1] / "_C.so"
_OPERATORS = ("mask_lengths", "mask_sample", "philox4x32", "clip_pixels", "rope3d_rotate")


@dataclass(frozen=True)
class Extension:
    """What `load` found."""

    path: Path | None
    """The library that is loaded; None: the operators are not there."""
    reason: str | None
    """Why nothing is loaded."""
    wanted: bool = True
    """False where the user switched the extension off."""
    built_with: str | None = None
    """Version of PyTorch at build time."""
    cuda_architectures: tuple[str, ...] = ()
    """Compute capabilities with machine code in the library, as in `90`; empty: C++ kernels only."""


@cache
def load() -> Extension:
    """Load the library; the first call decides for the life of the process."""
    if os.environ.get("VJEPA_FAST_EXT") == "0":
        return Extension(None, "VJEPA_FAST_EXT=0 is set", wanted=False)
    if not LIBRARY.exists():
        return Extension(None, f"{LIBRARY} does not exist: it was not built when vjepa-fast was installed")
    # Not at the top: `doctor` and the command line ask before anything needs torch.
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        library.vjepa_fast_build_info.restype = ctypes.c_char_p
        built = json.loads(library.vjepa_fast_build_info())
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        return Extension(None, f"{LIBRARY} does not load: {str(error).splitlines()[0]}")
    if built["version"] != vjepa_fast.__version__:
        return Extension(
            None,
            f"{LIBRARY} was built for vjepa-fast {built['version']}, this is {vjepa_fast.__version__}: install again",
        )
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.vjepa_fast, name)]
    if missing:
        return Extension(None, f"{LIBRARY} has no {', '.join(missing)}: it is older than the code, install again")
    architectures = tuple(name for name in built["cuda_architectures"].split(";") if name)
    return Extension(LIBRARY, None, built_with=built["torch"], cuda_architectures=architectures)
