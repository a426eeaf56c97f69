"""The curves of a run, from logs as they are found."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vjepa_fast.train.monitor.metrics import COLUMNS, MetricsLog
from vjepa_fast.train.report import curves as curves_module
from vjepa_fast.train.report.curves import MAX_POINTS, Curves, draw_learning, draw_training, read_curves, running_mean


def write(folder: Path, losses: list[float], health: dict[str, Any] | None = None) -> None:
    """Logs of a run with a line of metrics.jsonl for every step."""
    log = MetricsLog(folder, 0, 0)
    for step, loss in enumerate(losses):
        log.write([dict.fromkeys(COLUMNS, 1.0) | {"step": step, "loss": loss}], {"target_std": 0.5} | (health or {}))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_figures_of_every_step(tmp_path: Path) -> None:
    write(tmp_path, [3.0, math.nan, 1.0], {"explained": math.inf})
    found = read_curves(tmp_path)
    assert found.columns["step"].tolist() == [1, 2, 3]
    assert np.array_equal(found.columns["loss"], [3.0, math.nan, 1.0], equal_nan=True)
    assert found.series("target_std") == ([1, 2, 3], [0.5, 0.5, 0.5])
    assert found.series("explained") == ([], [])
    assert found.num_damaged == 0


def test_nothing_to_read(tmp_path: Path) -> None:
    assert len(read_curves(tmp_path)) == 0
    for name in ("metrics.jsonl", "log_r0.csv"):
        (tmp_path / name).write_bytes(b"")
    assert len(read_curves(tmp_path)) == 0


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, [3.0, 2.0])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"step": "x"}\n{"step": NaN}\n{"step": 2, "lo')
    with (tmp_path / "log_r0.csv").open("ab") as file:
        file.write(b"1,1,1,what\n1,5,0.5,1")
    found = read_curves(tmp_path)
    assert found.num_damaged == 5
    assert found.columns["loss"].tolist() == [3.0, 2.0]
    assert found.series("target_std")[0] == [1, 2]


def test_a_csv_that_is_gone_or_of_the_reference(tmp_path: Path) -> None:
    write(tmp_path, [3.0, 2.0])
    (tmp_path / "log_r0.csv").write_text("epoch,itr,loss\n1,0,7\n")
    assert read_curves(tmp_path).columns["loss"].tolist() == [3.0, 2.0]


def test_of_steps_that_are_there_twice_the_later_count(tmp_path: Path) -> None:
    write(tmp_path, [5.0, 4.0, 3.0])
    csv_text, jsonl_text = ((tmp_path / name).read_text() for name in ("log_r0.csv", "metrics.jsonl"))
    write(tmp_path, [5.0, 1.0], {"target_std": 0.25})
    (tmp_path / "log_r0.csv").write_text(csv_text + "".join((tmp_path / "log_r0.csv").read_text().splitlines(True)[1:]))
    (tmp_path / "metrics.jsonl").write_text(jsonl_text + (tmp_path / "metrics.jsonl").read_text())
    found = read_curves(tmp_path)
    assert found.columns["loss"].tolist() == [5.0, 1.0, 3.0]
    assert found.series("target_std") == ([1, 2, 3], [0.25, 0.25, 0.5])


def test_long_logs_are_thinned_out(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0, "target_std": step / 1e4}) for step in range(10_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    steps, values = read_curves(tmp_path).series("target_std")
    assert MAX_POINTS / 2 < len(steps) <= MAX_POINTS + 1
    assert (steps[0], steps[-1], values[-1]) == (1, 10_001, 1.0)


def test_a_spike_of_a_long_run_is_drawn(tmp_path: Path) -> None:
    steps = np.arange(1.0, 20_001)
    flat = {name: np.ones(len(steps)) for name in curves_module._COLUMNS} | {"step": steps}
    spike = flat["loss"].copy()
    spike[1234] = 1.5
    # The same scale for both.
    flat["loss"][-1] = spike[-1] = 1.5
    drawn = [pixels(draw_learning(Curves(flat | {"loss": loss}, [], 0))) for loss in (flat["loss"], spike)]
    differs = (np.abs(drawn[0].astype(int) - drawn[1]) > 40).any(-1)
    # As high as the last step, and not as the running mean.
    assert np.flatnonzero(differs.any(1))[0] < 80


def test_speed_is_that_of_all_time_but_the_first_steps() -> None:
    seconds, wait = np.array([9.0, 9, 9, 1, 3]), np.array([8.0, 8, 8, 0, 1])
    columns = {
        "step": np.arange(1.0, 6),
        "iter-time(ms)": 1e3 * seconds,
        "dataload-time(ms)": 1e3 * wait,
        "clips_per_s": 8 / seconds,
    }
    rate, share = Curves(columns, [], 0).speed()
    assert (rate, share) == pytest.approx((16 / 4, 1 / 4))


def test_marks_of_warnings_and_curves_are_in_the_pictures(tmp_path: Path) -> None:
    health = {
        "explained": 0.1,
        "context_std": 0.4,
        "target_rank": 9.0,
        "clip_cosine": 0.9,
        "loss_mask0": 1.0,
        "loss_slot3": 1.0,
        "loss_slotx": 1.0,
        "grad_norm_encoder": 0.0,
    }
    write(tmp_path, [3.0, 2.0, 1.0, 0.5], health)
    found = read_curves(tmp_path)
    for draw, num_panels in ((draw_learning, 6), (draw_training, 3)):
        plain, marked = pixels(draw(found)), pixels(draw(found, [2]))
        crimson = (marked == (220, 20, 60)).all(-1)
        assert not (plain == (220, 20, 60)).all(-1).any()
        # A mark stands in every panel, all of a row at the same height.
        assert len(np.unique(np.flatnonzero(crimson.any(0)) // (crimson.shape[1] // 3))) == 3
        assert crimson.any(1).sum() > 15 * num_panels / 3
    less = Curves(found.columns, [{**row, "target_std": None} for row in found.rows], 0)
    assert (pixels(draw_learning(less)) != pixels(draw_learning(found))).any()


@pytest.mark.parametrize("losses", [[math.nan], [1e300, 2.0], [0.0, -1.0, 1.0]])
def test_figures_that_are_hard_to_draw(losses: list[float], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path, losses, {"target_std": -1e308, "grad_norm_encoder": 0.0})
    found = read_curves(tmp_path)
    assert draw_learning(found).startswith(b"\x89PNG") and draw_training(found).startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn]


def test_running_mean() -> None:
    values = np.array([1.0, 3.0, math.nan, 5.0, 7.0])
    assert running_mean(values, 2).tolist() == [1, 2, 3, 5, 6]
    assert running_mean(values, 100).tolist() == [1, 2, 2, 3, 4]
    assert np.isnan(running_mean(np.array([math.nan]), 3)).all()
