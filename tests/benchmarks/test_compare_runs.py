"""Training runs side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare_runs import as_markdown, losses_of, summary


def run_folder(folder: Path, losses: list[float], velocity: float | None) -> Path:
    folder.mkdir()
    lines = ["step,loss,clips_per_s", *(f"{step},{loss},1.0" for step, loss in enumerate(losses))]
    (folder / "log_r0.csv").write_text("\n".join(lines) + "\n")
    if velocity is not None:
        (folder / "probe.json").write_text(json.dumps({"trained encoder": {"velocity_r2": velocity}}))
    return folder


def test_means_of_tenths_and_the_probe(tmp_path: Path) -> None:
    found = summary(run_folder(tmp_path / "a", [float(100 - i) for i in range(20)], 0.5))
    assert (found["first"], found["middle"], found["last"]) == (99.5, 90.5, 81.5)
    about = dict.fromkeys(("cpu", "cores", "python", "torch", "vjepa_fast", "command", "date"), "x")
    assert "| a | 20 | 99.5000 | 90.5000 | 81.5000 | 0.50 |" in as_markdown([found], about)
    assert summary(run_folder(tmp_path / "b", [1.0], None))["velocity_r2"] is None


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a run folder"):
        losses_of(tmp_path)


def test_table_json_and_picture(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, [1.0, 0.5], 0.1) for name in ("a", "b")]
    command = [sys.executable, "-m", "benchmarks.compare_runs", *map(str, runs), "--out", str(tmp_path / "out" / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| b | 2 |" in done.stdout
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png"]
