"""Parts of the extension built for tests: with sanitizers, and the threads of CUDA kernels run on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = "VJEPA_FAST_FUZZ_FOLDER"
"""Names the folder with the libraries to a process that `run_sanitized` started."""

_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _build_sanitized(operators: str, emulated: str, folder: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-shared", *_SANITIZE]
    subprocess.run(
        [
            compiler,
            *flags,
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DTORCH_STABLE_ONLY",
            *(word for path in include_paths() for word in ("-isystem", path)),
            str(ROOT / "csrc" / operators),
            "-o",
            str(folder / "operators.so"),
            *(f"-L{path}" for path in library_paths()),
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ],
        check=True,
    )
    subprocess.run(
        [compiler, *flags, str(ROOT / "tests/csrc" / emulated), "-o", str(folder / "emulated.so")], check=True
    )


def run_sanitized(script: str, arguments: list[str], operators: str, emulated: str, **environment: str) -> int:
    """The script again, in a process that has the sanitizers' runtimes from the start; its exit code.

    Args:
        script: file.
        arguments: its own.
        operators: file in csrc, built as operators.so into the folder that CHILD names.
        emulated: file in tests/csrc, built as emulated.so.
        environment: more variables.
    """
    compiler = os.environ.get("CXX", "g++")
    # The C++ library too, or the sanitizer does not find what throws exceptions.
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    with tempfile.TemporaryDirectory() as folder:
        _build_sanitized(operators, emulated, Path(folder))
        variables = {
            **os.environ,
            CHILD: folder,
            "VJEPA_FAST_EXT": "0",
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONPATH": str(ROOT),
            "UBSAN_OPTIONS": "print_stacktrace=1",
            **environment,
        }
        return subprocess.run([sys.executable, script, *arguments], env=variables).returncode


def load_emulator(source: str, folder: Path) -> ctypes.CDLL:
    """The threads of a CUDA kernel, run on the CPU under checks of arithmetic; skips where there is no compiler.

    Args:
        source: file in tests/csrc.
        folder: for the library.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = folder / Path(source).with_suffix(".so").name
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            "-fsanitize=undefined",
            "-fno-sanitize-recover=all",
            "-static-libubsan",
            str(ROOT / "tests/csrc" / source),
            "-o",
            str(target),
        ],
        check=True,
    )
    return ctypes.CDLL(str(target))
