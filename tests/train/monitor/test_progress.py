"""The progress line at a terminal of any width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from vjepa_fast.train.monitor.progress import ProgressReport, fitting

FIGURES = {
    "loss": "loss 0.4093",
    "explained": "explained 16 %",
    "lr": "lr 2.07e-04",
    "speed": "79.2 clips/s",
    "data wait": "data wait 1 %",
    "eta": "eta 0:11:20",
}


def shown(width: int, total: int = 3600) -> str:
    """The last line that a terminal shows, without its colours."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    progress = ProgressReport(total, 0, console)
    progress.report(384, loss=0.4093, lr=2.07e-4, clips_per_s=79.2, data_wait=0.01, explained=0.16)
    progress.close()
    file = console.file
    assert isinstance(file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).rstrip().splitlines()[-1].split("\r")[-1]


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
def test_steps_loss_and_time_left_are_always_there(width: int) -> None:
    line = shown(width)
    assert len(line) <= width
    assert "…" not in line
    assert line.startswith("step 384/3600 ")
    assert "loss 0.4093" in line and "eta 0:" in line


def test_eighty_columns() -> None:
    """The width of most terminals: all but rate and waiting."""
    line = shown(80)
    assert "explained 16 %" in line and "79.2 clips/s" in line


def test_a_wide_terminal_has_all() -> None:
    line = shown(120)
    for word in ("loss 0.4093", "explained 16 %", "lr 2.07e-04", "79.2 clips/s", "data wait 1 %", "eta "):
        assert word in line


def test_what_goes_first() -> None:
    whole = "  ".join(FIGURES.values())
    assert fitting(FIGURES, len(whole)) == whole
    assert "lr" not in fitting(FIGURES, len(whole) - 1)
    assert fitting(FIGURES, 10) == "loss 0.4093  eta 0:11:20"
