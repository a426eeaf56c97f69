"""The page of ViT-B's run on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.learn_on_gpu import config, write
from experiments.physics_probes import QUANTITIES


def test_a_page_with_a_side_that_ended_early(tmp_path: Path) -> None:
    probe = {"rank": 30.0, "scores": {read_out: dict.fromkeys(QUANTITIES, 0.5) for read_out in ("mean", "last")}}
    about = dict.fromkeys(
        ("device", "cpu", "cores", "python", "torch", "triton", "vjepa_fast", "commit", "command", "date"), "x"
    )
    sides: dict[str, Any] = {
        "ours": {"losses": [1.0] * 30 + [0.5] * 70, "clips_per_s": 800.0, "data_wait": 0.05, "probe": probe},
        "untrained": {"probe": probe},
        "reference": {"losses": [1.0] * 60, "clips_per_s": 100.0, "probe": probe},
    }
    write({"environment": about, "sides": sides}, tmp_path / "a.b")
    page = (tmp_path / "a.b.md").read_text()
    assert "| steps | 100 |  | 60 |" in page and "| waits for clips | 5.0% |  |  |" in page
    assert "| loss, 20 steps to step 50 | 0.5000 |  | 1.0000 |" in page
    assert "| loss, 20 steps to step 100 | 0.5000 |  |  |" in page
    assert json.loads((tmp_path / "a.b.json").read_text())["sides"] == sides and (tmp_path / "a.b.png").exists()


def test_schedules_span_the_steps() -> None:
    cfg = config(Path("pack"), 1000, [])
    assert cfg.optimization.num_steps == 1000 and cfg.model.model_name == "vit_base" and cfg.train.dtype == "bfloat16"
