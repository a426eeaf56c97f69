"""The probes at the end of a run on the demo's clips: who gets them, and on which clips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vjepa_fast.data.generated.registry import SYNTHETIC
from vjepa_fast.evaluation import demo
from vjepa_fast.train.pretraining import Pretraining


def trainer_of(task: Any, *, probe: bool = True, is_first: bool = True) -> Any:
    return SimpleNamespace(
        cfg=SimpleNamespace(train=SimpleNamespace(probe=probe)),
        task=task,
        processes=SimpleNamespace(is_first=is_first),
        device=torch.device("cpu"),
        folder=Path("run"),
        console=None,
    )


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo, "probe_table", lambda *arguments: calls.append(arguments))
    return calls


def pretraining() -> Pretraining:
    task = object.__new__(Pretraining)
    task.model = nn.Linear(1, 1)  # type: ignore[assignment]
    task.manifests = {SYNTHETIC: Path("clips/train.csv")}
    return task


def test_the_model_and_the_clips_of_the_run(probed: list[tuple[Any, ...]]) -> None:
    task = pretraining()
    demo.probe_run(trainer_of(task))
    ((_, model, clips, folder, _),) = probed
    assert (model, folder) == (task.model, Path("run"))
    assert (clips.train_csv, clips.val_csv) == (Path("clips/train.csv"), Path("clips/val.csv"))


def test_no_probes(probed: list[tuple[Any, ...]]) -> None:
    demo.probe_run(trainer_of(pretraining(), probe=False))
    demo.probe_run(trainer_of(pretraining(), is_first=False))
    demo.probe_run(trainer_of(object()))
    assert not probed
