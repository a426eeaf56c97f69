"""The references' own training scripts with vf.swap and without it: same losses, and checkpoints that go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .meta_swap_main import EPOCHS, IPE, VERSIONS


def run(name: str, folder: Path, swap: bool) -> tuple[list[float], int]:
    """The loss of every step, and how often our attention ran."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.parity.meta_swap_main", name, str(folder), *(["swap"] if swap else [])]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=300)
    found = json.loads((folder / "losses.json").read_text())
    return found["losses"], found["calls"]


@pytest.mark.parametrize("name", VERSIONS)
def test_training_script(name: str, tmp_path: Path) -> None:
    version = VERSIONS[name]
    if not os.environ.get(version.variable):
        pytest.skip(f"{version.variable} does not name a checkout")
    case = version.case
    expected, none = run(name, tmp_path / "theirs", False)
    assert none == 0 and len(expected) == IPE * EPOCHS >= 5
    found, calls = run(name, tmp_path / "ours", True)
    assert calls == IPE * EPOCHS * (2 * case.depth + case.pred_depth)
    assert found == pytest.approx(expected, rel=1e-5)
    if name == "v1 noised":
        # A script that is started again draws other noise.
        return
    # The checkpoint that was written in the middle, taken up by the script alone.
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "ours" / version.kept.format(EPOCHS - 2), tmp_path / "again" / version.latest)
    resumed, none = run(name, tmp_path / "again", False)
    assert none == 0 and resumed == pytest.approx(expected[-IPE:], rel=1e-5)
    last = [torch.load(tmp_path / folder / version.latest, weights_only=True) for folder in ("theirs", "ours")]
    assert [list(part) for part in last[0]["opt"]["state"].values()] == [
        list(part) for part in last[1]["opt"]["state"].values()]
    for part in ("encoder", "predictor", "target_encoder"):
        assert list(last[0][part]) == list(last[1][part])
        for key, value in last[0][part].items():
            difference = (last[1][part][key] - value).norm()
            assert difference <= 1e-3 * value.norm(), key
