"""How setup.py takes machines and wishes that it cannot serve; that it builds is for the tests of the operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux")


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build into a folder of the test's own, without a compiler and without nvcc."""
    (tmp_path / "bin").mkdir()
    for name in ("csrc", "vjepa_fast", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (tmp_path / name).symlink_to(ROOT / name)
    hidden = {"CXX": str(tmp_path / "no-compiler"), "PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path)}
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "setup.py"),
            "build_ext",
            "--build-lib",
            str(tmp_path / "lib"),
            "--build-temp",
            str(tmp_path / "temp"),
        ],
        cwd=tmp_path,
        env={**os.environ, **hidden, **environment},
        text=True,
        capture_output=True,
    )


def test_without_a_compiler_the_installation_succeeds_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, VJEPA_FAST_EXT="auto")
    assert done.returncode == 0, done.stderr
    assert "built without the C++ extension" in done.stderr and "no-compiler failed" in done.stderr
    assert not list(tmp_path.glob("lib/**/*.so"))


@pytest.mark.parametrize(
    ("wish", "message"),
    [("cpu", "no-compiler failed"), ("gpu", "VJEPA_FAST_EXT is 'gpu'; expected auto, cpu, cuda or 0")],
)
def test_what_was_asked_for_and_cannot_be_had_is_an_error(tmp_path: Path, wish: str, message: str) -> None:
    done = build(tmp_path, VJEPA_FAST_EXT=wish)
    assert done.returncode != 0
    assert message in done.stderr


def test_nothing_is_built_where_nothing_is_wanted(tmp_path: Path) -> None:
    done = build(tmp_path, VJEPA_FAST_EXT="0")
    assert done.returncode == 0 and not list(tmp_path.glob("lib/**/*.so"))


def test_cuda_needs_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, VJEPA_FAST_EXT="cuda", CXX="/bin/true")
    assert done.returncode != 0 and "needs nvcc" in done.stderr
