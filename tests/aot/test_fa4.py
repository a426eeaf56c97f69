"""FlashAttention 4's real kernels compile for Hopper from our calls; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_fast.ops.attention.backends import BACKENDS

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 80, 88, 96, 104])
def test_compiles(head_dim: int) -> None:
    why = BACKENDS["fa4"].missing() if BACKENDS["fa4"].version is None else None
    if why is not None:
        pytest.skip(why)
    path = os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / "compile_fa4.py"), str(head_dim)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        pytest.skip("takes more than a minute here")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert ("backward" in found["seconds"]) == (head_dim != 104)
