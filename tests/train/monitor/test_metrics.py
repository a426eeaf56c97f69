"""What a run writes down."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vjepa_fast.common import atomic
from vjepa_fast.common.errors import UserError
from vjepa_fast.train.monitor.metrics import COLUMNS, MetricsLog, read_csv


def row(step: int, loss: float = 0.5) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS, 1.0) | {"step": step, "loss": loss}


def test_reference_columns_come_first(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, 0)
    header = (tmp_path / "log_r0.csv").read_text().splitlines()[0]
    assert header.startswith("epoch,itr,loss,iter-time(ms),gpu-time(ms),dataload-time(ms),")


def test_losses_are_written_to_the_last_bit(tmp_path: Path) -> None:
    values = torch.rand(200).tolist()
    log = MetricsLog(tmp_path, 0, 0)
    log.write([row(step, loss) for step, loss in enumerate(values)])
    read = [float(line["loss"]) for line in read_csv(log.csv_path)]
    assert np.array_equal(np.float32(read), np.float32(values))


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 0)
    for step in range(5):
        log.write([row(step)], {"target_std": 0.1})
    # What a kill leaves: lines cut short.
    with log.csv_path.open("a") as csv_file, log.jsonl_path.open("a") as jsonl_file:
        csv_file.write("1,5,0.5,1")
        jsonl_file.write('{"step": 5, "lo')
    log = MetricsLog(tmp_path, 0, 3)
    log.write([row(3), row(4)])
    assert [int(line["step"]) for line in read_csv(log.csv_path)] == [0, 1, 2, 3, 4]
    assert [json.loads(line)["step"] for line in log.jsonl_path.read_text().splitlines()] == [0, 1, 2, 4]


def test_a_kill_while_rows_are_dropped_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, 0, 0)
    log.write([row(0), row(1)])
    before = log.csv_path.read_text()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, 0, 1)
    assert log.csv_path.read_text() == before


def test_jsonl_is_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 0)
    log.write([row(0, math.nan)], {"target_rank": math.inf})
    (line,) = log.jsonl_path.read_text().splitlines()
    read = json.loads(line, parse_constant=lambda text: pytest.fail(text))
    assert (read["loss"], read["target_rank"]) == (None, None)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, 0, 0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write .*log_r0.csv: the disk is full"):
        log.write([row(0)])


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, 0, 0, tensorboard=True)
    log.write([row(0, 0.75)], {"target_std": 0.25})
    log.close()
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [event.value for event in accumulator.Scalars("loss")] == [0.75]
    assert [event.value for event in accumulator.Scalars("target_std")] == [0.25]


def test_a_log_of_the_reference_is_kept_beside_ours(tmp_path: Path) -> None:
    theirs = "epoch,itr,loss,iter-time(ms),gpu-time(ms),dataload-time(ms)\n1,0,0.5,1,1,1\n"
    (tmp_path / "log_r0.csv").write_text(theirs)
    MetricsLog(tmp_path, 0, 5).close()
    assert (tmp_path / "log_r0.before.csv").read_text() == theirs
    MetricsLog(tmp_path, 0, 5).close()
    assert (tmp_path / "log_r0.before.csv").read_text() == theirs
