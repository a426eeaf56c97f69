"""The one call for a GPU machine, tried out on the CPU at a size that means nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_run import PARTS, TIMED, Part, Settings, as_table, run_part
from vjepa_fast.bench.timing import ROOT, pick_device


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out)}
    environment.pop("VJEPA2_REFERENCE", None)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_run", "--cpu", "--small", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_parts_write_their_results(tmp_path: Path) -> None:
    done = call(tmp_path, "--parts", "environment", "step", "graphed")
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    report = json.loads((tmp_path / "gpu_run.json").read_text())
    assert list(report) == ["environment", "step", "graphed"]
    assert report["environment"]["result"]["cpu"]
    assert report["step"]["result"]["ours"]["clips_per_s"] > 0
    assert "step: ours" in done.stdout
    assert "graphed: the step cannot be a CUDA graph: CUDA graphs need a GPU" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_run.json", "log.txt"]


def test_a_part_that_hangs_or_fails_is_reported(tmp_path: Path, monkeypatch) -> None:
    settings = Settings(pick_device("cpu"), True, tmp_path)
    monkeypatch.setitem(PARTS, "step", Part(PARTS["step"].run, 0))
    # The part reads limits from a file that holds something else.
    (tmp_path / "floors.json").write_text("[]")
    with open(tmp_path / "log.txt", "wb") as log:
        hung = run_part("step", settings, log)
    assert hung["error"] == "stopped after 0 s" and hung["result"] is None
    monkeypatch.undo()
    with open(tmp_path / "log.txt", "wb") as log:
        failed = run_part("step", settings, log)
    assert failed["error"] == "exit code 1" and failed["result"] is None
    everything = {name: {"seconds": 0.0, "error": "left out", "result": None} for name in PARTS}
    assert "stopped after 0 s" in as_table({**everything, "step": hung})


def test_table_sets_the_prediction_beside_the_profile() -> None:
    nothing = {"seconds": 0.0, "error": None, "result": None}
    found = {
        "ms_by_kind": {"matmul": 60.0},
        "operators": [],
        "ms_by_part": {"target encoder": 84.0},
        "predicted_ms_by_part": {"target encoder": 70.0},
    }
    text = as_table({**{name: nothing for name in PARTS}, "profile": {**nothing, "result": found}})
    assert [line.split() for line in text.splitlines() if line.startswith("target encoder")] == [
        ["target", "encoder", "70.00", "84.00", "1.20", "*"]
    ]


def test_time_limits_fit_the_call() -> None:
    assert sum(PARTS[name].limit_s for name in TIMED) <= 13 * 60
    assert sum(PARTS[name].limit_s for name in ("environment", "tests")) < 9 * 60
