"""Progress of counted work, in a log file and at a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from vjepa_fast.common import progress_bar
from vjepa_fast.common.progress_bar import Bar, ProgressBar


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_bar, "time", made)
    return made


def test_a_log_has_a_line_every_ten_seconds_and_the_last(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("embedded", "videos", 100, 20)
    for done in range(21, 101):
        clock.now += 0.25
        bar.show(done, "0 broken")
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "resuming: 20 of 100 videos were done before",
        "embedded 60/100  4.00 videos/s  0 broken  eta 0:00:10",
        "embedded 100/100  4.00 videos/s  0 broken  eta 0:00:00",
    ]


def test_no_rate_before_anything_is_new(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("packed", "videos", 3, 3)
    clock.now += 20
    bar.show(3, "1 broken")
    assert capsys.readouterr().err.splitlines()[1:] == ["packed 3/3  1 broken"]


def screen(console: Console) -> list[str]:
    file = console.file
    assert isinstance(file, io.StringIO)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return [part.rstrip() for part in re.split(r"[\r\n]+", text) if part.strip()]


@pytest.mark.parametrize("live", [False, True])
def test_a_terminal_has_one_line_that_changes(live: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, legacy_windows=False)
    bar = ProgressBar("step", 10, 2, console, live=live)
    assert bar.is_bar and bar.room == 60 - len("step 10/10") - 8
    bar.show(4, "loss 0.5")
    bar.advance(7)
    bar.close()
    seen = screen(console)
    assert seen[-1].startswith("step 7/10 ") and seen[-1].endswith(" loss 0.5")
    assert all(line.startswith("step ") and len(line) <= 60 for line in seen)


def test_where_there_is_no_terminal_only_what_is_shown_is_printed() -> None:
    console = Console(file=io.StringIO(), width=20)
    bar = ProgressBar("step", 10, 0, console, live=True)
    bar.advance(3)
    bar.show(5, "figures that are not broken into two lines")
    bar.close()
    assert screen(console) == ["step 5/10  figures that are not broken into two lines"]
