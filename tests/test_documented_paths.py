"""Import paths and `python -m` commands that documentation has named keep working, wherever the code has moved."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

IMPORTS = {
    "vjepa_fast.interop.meta": ("MaskCollator", "load_checkpoint", "save_checkpoint"),
    "vjepa_fast.interop.huggingface": ("encoder_to_hf", "from_hf", "to_hf"),
    "vjepa_fast.inference": ("InferenceModel", "load"),
    "vjepa_fast.data.physics": ("make_physics",),
    "vjepa_fast.data.sampling": (),
    "vjepa_fast.ops.attention": ("attention", "select_backend"),
    # The name under which jobs that wait in SLURM's queue were pickled.
    "vjepa_fast.submit": ("TrainingJob",),
}

COMMANDS = ("vjepa_fast.train.report", "vjepa_fast.data.physics", "vjepa_fast.evaluation.physics_targets")


@pytest.mark.parametrize("module", IMPORTS)
def test_imports(module: str) -> None:
    found = import_module(module)
    assert all(hasattr(found, name) for name in IMPORTS[module])


@pytest.mark.parametrize("module", COMMANDS)
def test_commands(module: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    assert f"python -m {module}" in result.stdout
