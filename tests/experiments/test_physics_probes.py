"""The tables of probes of physics: what is gathered, and that a run is not done twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.physics_probes import QUANTITIES, Job, _split, effective_rank, gather, margins, pack_videos, run, table
from experiments.small_scale import READ
from experiments.small_scale import table as table_of_settings
from vjepa_fast.data.generated.physics import make_physics


def one(objective: str, seed: int, value: float, **more: Any) -> dict[str, Any]:
    scores = {read_out: {q: value for q in QUANTITIES} for read_out in ("mean", "last")}
    return {"objective": objective, "seed": seed, "scores": {"encoder": scores}, "rank": {"encoder": 4.0}, **more}


def test_tables_give_means_and_spreads() -> None:
    raw = {q: 0.125 for q in QUANTITIES}
    runs = [one("latent", 0, 0.5), one("latent", 1, 0.7), one("pixels", 0, 0.25), one("untrained", 0, 0.0, pixels=raw)]
    rows = gather(runs)
    assert rows["latent, mean"]["velocity"] == [0.5, 0.7] and rows["pixels, last"]["law"] == [0.25]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| latent, mean | 0.60 (0.50 to 0.70) |")
    assert lines[-1] == "| raw pixels, 16 x 16, all frames" + " | 0.12" * len(QUANTITIES) + " |"
    trained = {"steps": 60, "minutes": 0.5, "log": {"explained": 0.25}}
    settings = table_of_settings({"lr": [one("latent", 0, 0.5, **trained)]}, [one("untrained", 0, 0.0)]).splitlines()
    assert settings[2] == "| lr | 60" + " | 0.50 (0.50 to 0.50)" * len(READ) + " | 4.0 | 0.25 | 0.50 |"
    assert settings[3].startswith("| untrained |  | 0.00")


def test_margins_in_deviations_of_a_difference() -> None:
    rows = gather(
        [
            one("latent", 0, 0.5),
            one("latent", 1, 0.7),
            one("untrained", 0, 0.1),
            one("untrained", 1, 0.1),
            one("untrained", 2, 0.1, pixels={q: 0.0 for q in QUANTITIES}),
        ]
    )
    lines = margins(rows).splitlines()
    # 0.5 over the deviation of 0.5 and 0.7, which is 0.1 * sqrt(2).
    assert lines[2] == "| latent, mean" + " | +0.50 (3.5 std)" * len(QUANTITIES) + " |"
    assert len(lines) == 4


def test_effective_rank() -> None:
    class Known(torch.nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return clips

    directions = torch.eye(4)[None].repeat(2, 1, 1)
    assert effective_rank(Known(), torch.cat([directions, -directions])) == pytest.approx(4)  # type: ignore[arg-type]
    flat = torch.zeros(1, 6, 4)
    flat[0, :, 0] = torch.arange(6)
    assert effective_rank(Known(), flat) == pytest.approx(1, abs=0.01)  # type: ignore[arg-type]


def test_a_run_is_kept(tmp_path: Path) -> None:
    made = make_physics(tmp_path / "videos", 8, 4)
    pack_videos(made, tmp_path / "pack")
    small = ["model.depth=1", "model.pred_depth=1", "data.global_batch_size=2", "data.num_workers=0"]
    job = Job("latent", 0, 0.0, 10, 1, small, made, tmp_path / "pack", tmp_path / "runs")
    found = run(job)
    assert found["steps"] == 10 and "explained" in found["log"] and set(found["rank"]) == {"encoder", "target encoder"}
    kept = tmp_path / "runs" / "latent_0" / "found.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "steps": 11}))
    assert run(job)["steps"] == 11
    # Scored on other videos it is not trained again.
    more = make_physics(tmp_path / "more", 12, 4)
    again = run(replace(job, labelled=more))
    assert again["steps"] == 11 and again["labelled"] == [12, 4] and again["rank"] == pytest.approx(found["rank"])
    # As text, in which nan (of a class that so few videos lack) is itself.
    assert json.dumps(again["scores"]) != json.dumps(found["scores"]) == json.dumps(run(job)["scores"])
    # Clips are read once for encoders of all seeds.
    _split.cache_clear()
    for seed in (0, 1):
        run(replace(job, objective="untrained", seed=seed))
    assert _split.cache_info().misses == 2
    # Of other settings it is done anew.
    assert run(replace(job, changes=[*small, "optimization.lr=1e-4"]))["steps"] == 10
