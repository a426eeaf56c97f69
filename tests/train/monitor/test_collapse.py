"""Warnings of a run that collapses: from figures alone, and from a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import vjepa_fast as vf
from vjepa_fast.train.monitor.collapse import CollapseWatch, Finding
from vjepa_fast.train.trainer import Trainer

HEALTHY = {
    "target_std": 0.55,
    "target_rank": 40.0,
    "context_std": 0.5,
    "context_rank": 20.0,
    "prediction_std": 0.2,
    "explained": 0.2,
    "weight_rms": 0.02,
}


def watch(*looks: dict[str, float | None], changes: tuple[str, ...] = ()) -> list[Finding | None]:
    """What is found in rows that differ from healthy ones."""
    one = CollapseWatch(vf.load_recipe("demo", list(changes)))
    return [one.observe(HEALTHY | {"step": 10.0 * number} | look) for number, look in enumerate(looks)]


def test_the_healthy_and_the_unknown_find_nothing() -> None:
    # A run begins with a predictor that answers with a constant, and far from the best one.
    beginning = [{"explained": e, "prediction_std": 0.001} for e in (-3.0, -0.9, -0.2, -0.02, 0.0, 0.0, 0.01)]
    assert watch(*beginning, {}, {}) == [None] * 9
    assert watch({}, {"target_rank": 19.0}) == [None, None]
    # One step with clips that differ little.
    assert watch({}, {"target_rank": 13.0}, {}, {"context_std": 0.05}, {"target_std": 0.05}, {}) == [None] * 6
    fallen_back: list[dict[str, float | None]] = [{"explained": 0.0 if number % 3 else 0.1} for number in range(30)]
    assert watch(*fallen_back) == [None] * 30
    nothing: dict[str, float | None] = dict.fromkeys(HEALTHY)
    assert watch(nothing, nothing) == [None, None]


@pytest.mark.parametrize(
    ("kind", "cause", "rows", "changes"),
    [
        ("constant targets", "gradient", [{}, {"target_std": 0.05}], ()),
        ("constant targets", "momentum", [{}, {"target_std": 0.05}], ("optimization.ema=[0.5, 0.5]",)),
        ("lost directions", "momentum", [{}, {"target_rank": 13.0}], ("optimization.ema=[0.0, 0.0]",)),
        (
            "lost directions",
            "momentum",
            [{}, {"target_rank": 19.0, "explained": 0.05}],
            ("optimization.ema=[0.0, 0.0]",),
        ),
        (
            "lost directions",
            "learning rate",
            [{}, {"context_rank": 1.5, "weight_rms": 0.03}] + [{}] * 3 + [{"context_rank": 1.5}],
            ("optimization.lr=0.02", "optimization.warmup=0"),
        ),
        (
            "vanishing weights",
            "weight decay",
            [{}] + [{"weight_rms": 0.01}] * 6 + [{"weight_rms": 0.001}],
            ("optimization.weight_decay=50", "optimization.final_weight_decay=50"),
        ),
        (
            "constant features",
            "weight decay",
            [{}] + [{"weight_rms": 0.01}] * 6 + [{"context_std": 0.05, "weight_rms": 0.001}],
            ("optimization.weight_decay=50", "optimization.final_weight_decay=50"),
        ),
        ("constant features", "unknown", [{}, {"context_std": 0.05}], ()),
        ("visible answer", "masks", [{}, {"explained": 0.97}], ()),
        ("worse than a constant", "penalty", [{"explained": -1.5}] * 6, ("loss.prediction_l2=10",)),
        ("worse than a constant", "learning rate", [{"explained": -1.5}] * 6, ()),
        ("constant answer", "unknown", [{"explained": 0.0}] * 15, ("loss.loss_exp=1",)),
    ],
)
def test_what_is_named(kind: str, cause: str, rows: list[dict[str, float]], changes: tuple[str, ...]) -> None:
    found = [finding for finding in watch(*rows, *rows[-1:], changes=changes) if finding is not None]
    # Once, however long it lasts.
    assert [(finding.kind, finding.cause) for finding in found] == [(kind, cause)]
    assert "Try" in found[0].text or "try" in found[0].text or cause == "gradient"


def test_a_run_that_is_made_to_collapse(
    make: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decay = ("optimization.weight_decay=200", "optimization.final_weight_decay=200", "optimization.ema=[0.9, 0.9]")
    make(*decay, "train.max_steps=30").fit()
    (warning, *_) = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert warning["cause"] == "weight decay"
    said = capsys.readouterr().out
    assert f"WARNING, step {warning['step']}: " in said and "optimization.weight_decay" in said
    assert "warnings.jsonl" in said.split("finished at")[1]
    # A run that goes on has said it already.
    make(*decay, "train.max_steps=32", resume=True).fit()
    assert "WARNING" not in capsys.readouterr().out
    lines = (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == warning
