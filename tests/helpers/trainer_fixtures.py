"""A handful of tiny videos, and the trainer of a tiny run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import write_video
from tests.helpers.tiny import tiny_config
from vjepa_fast.train.trainer import Trainer


@pytest.fixture(scope="session")
def video_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of eight H.264 videos."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(folder / f"{number}.mp4", number)
    (folder / "list.csv").write_text("".join(f"{folder}/{number}.mp4 0\n" for number in range(8)))
    return folder / "list.csv"


@pytest.fixture
def make(video_csv: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Builds the trainer of a tiny run in tmp_path/run, with overrides."""

    def build(*changes: str, csv_path: Path = video_csv, resume: bool = False) -> Trainer:
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(tiny_config(csv_path, tmp_path / "cache", *changes), folder=tmp_path / "run", resume=resume)

    return build


def poison(trainer: Trainer, steps: range) -> None:
    """Makes the gradients of some steps not finite."""
    parameter = trainer.model.predictor.predictor_proj.weight

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if trainer.step in steps else gradient

    parameter.register_hook(spoil)
