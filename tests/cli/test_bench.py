"""`vjepa-fast bench` at a size that means nothing: what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from vjepa_fast.bench import report as pages
from vjepa_fast.bench.reference import REFERENCE_COMMIT
from vjepa_fast.bench.workload import TRIAL, of_config
from vjepa_fast.cli.main import app
from vjepa_fast.config import load_recipe
from vjepa_fast.data.decode.dali import missing
from vjepa_fast.data.generated.synthetic import make_synthetic


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args], prog_name="vjepa-fast", env={"COLUMNS": "200", "NO_COLOR": "1"})


def written(out: Path) -> dict[str, Any]:
    [file] = out.glob("*.json")
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


def test_step_and_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    videos = make_synthetic(tmp_path / "videos", 4, 1, size=48, num_frames=40, fps=10).train_csv
    out = tmp_path / "out"
    result = invoke("--size", "trial", "--device", "cpu", "--rounds", "2", "--loader", str(videos), "--out", str(out))
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert "measuring the CPU" in result.stdout and "core-ms a clip" in result.stdout
    assert "so it needs" in result.stdout and "decoding would take" in result.stdout
    report = written(out)
    assert report["step"]["figures"]["clips_per_s"] > 0 and report["step"]["figures"]["count"] == 2
    loader = report["loader"]
    rows = {(row["format"], row["backend"]): row for row in loader["rows"]}
    assert set(rows) == {(kind, backend) for kind in ("videos", "pack") for backend in ("pyav", "dali")}
    for kind in ("videos", "pack"):
        row = rows[kind, "pyav"]
        assert row["core_ms_per_clip"] > 0 and row["clips_per_s"] > 0 and 0 < row["waits"] < 1 and row["notes"] == []
        assert rows[kind, "dali"].get("error") == missing(torch.device("cpu"))
    assert loader["sample"] == {"num_listed": 4, "num_tried": 4, "num_used": 4, "num_broken": 0}
    assert loader["pack"]["num_videos"] == 4 and loader["pack"]["psnr"] > 20
    assert loader["step_ms_per_clip"] == pytest.approx(1e3 / report["step"]["figures"]["clips_per_s"])
    # Nothing stays behind.
    assert not list((tmp_path / "cache" / "vjepa_fast").glob("bench-*"))
    assert {"commit", "torch", "command", "date"} <= set(report["environment"])
    page = next(out.glob("*.md")).read_text()
    assert "it says nothing about a GPU" in page and "| target encoder |" in page and "| pack | PyAV |" in page
    assert str(tmp_path) not in page


@pytest.mark.skipif(not os.environ.get("VJEPA2_REFERENCE"), reason="VJEPA2_REFERENCE does not name a checkout")
def test_beside_the_reference(tmp_path: Path) -> None:
    result = invoke(
        "--size",
        "trial",
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
        "--reference",
        os.environ["VJEPA2_REFERENCE"],
    )
    assert result.exit_code == 0, result.output
    report = written(tmp_path)
    assert report["reference"]["reference"]["over_ours"]["count"] == 2
    losses = report["reference"]["reference"]["first_loss"]
    assert losses["ours"] == pytest.approx(losses["reference"], rel=1e-5)
    assert report["reference_written_against"] == REFERENCE_COMMIT


def test_page_of_settings_that_failed() -> None:
    times = {
        "p20": 0.9,
        "p50": 1.0,
        "p80": 1.1,
        "clips_per_s": 24.0,
        "model_tflop_per_s": 85.0,
        "share_of_matmul_rate": 0.1,
        "unseen_shapes": {"p50": 2.0},
    }
    ratio = {"p20": 1.8, "p50": 2.0, "p80": 2.1}
    found = pages.as_markdown(
        {
            "environment": {
                "device": "NVIDIA H200",
                "cpu": "x",
                "cores": 8,
                "load_average": 0.0,
                "python": "3",
                "torch": "2",
                "triton": "3",
                "vjepa_fast": "0",
                "commit": None,
                "uncommitted_changes": None,
                "command": "c",
                "date": "d",
            },
            "limits": {"bytes_per_s": 4e12, "flops_per_s": 8e14, "dtype": "bfloat16"},
            "workload": TRIAL.as_dict(),
            "load_average_after": 0.0,
            "step": {
                "figures": times,
                "profile": {"ms_by_part": {"optimizer": 3.0}},
                "graphed": {**times, "num_buckets": 4, "eager_over_graphed": {"p50": 1.25}, "warm_up_s": 9.0},
            },
            "reference": {
                "reference as configured": {**times, "over_ours": ratio},
                "reference, and compiled": {"error": "out of memory: ..."},
            },
        }
    )
    row = "| reference as configured | 1000.0 (900.0 to 1100.0) | 24.00 | 85 (10 %) | 2000.0 | 2.00 (1.80 to 2.10) |"
    assert row in found
    assert "As CUDA graphs (4 of them): 1000.0 ms a step, 24.00 clips/s; in turns with it the eager" in found
    assert "| reference, and compiled | out of memory: ... |" in found
    assert "says nothing about a GPU" not in found


def test_workload_of_a_recipe() -> None:
    cfg = load_recipe("demo")
    work = of_config("demo", cfg)
    assert work.batch_size == 16 and work.config is cfg
    clips, masks = work.clips(torch.device("cpu")), work.masks(torch.device("cpu"))
    assert tuple(clips.shape) == (16, 8, 48, 48, 3)
    assert work.model(torch.device("cpu"))(clips, masks).loss.ndim == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--reference", "nowhere"), "--reference: nowhere is not a folder; give a checkout of"),
        (("--reference", "."), "so it is no checkout of facebookresearch/vjepa2"),
        (("--size", "tiny", "--recipe", "demo"), "--size and --recipe are both given"),
        (("--size", "trial", "--device", "cpu", "--loader", "no.csv"), "'no.csv' does not exist"),
    ],
)
def test_mistakes(args: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args, "--out", str(tmp_path))
    assert result.exit_code in (1, 2) and said in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("--size", "trial", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path / "file"))
    assert result.exit_code == 1 and "--out names another folder" in result.stderr
