"""A small checkpoint and labelled videos for frozen evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import models
from tests.data.conftest import write_video


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of 24 frames a second, of different lengths and sizes."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(
            folder / f"{number}.mp4", num_frames=26 + 2 * number, preset="ultrafast", width=96 if number % 2 else 64
        )
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def manifests(videos: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Six videos to train on, classes 3 and 7, and two to validate on."""
    lines = [f"{videos / f'{number}.mp4'} {7 if number % 2 else 3}\n" for number in range(8)]
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text("".join(lines[:6]))
    val.write_text("".join(lines[6:]))
    return train, val
