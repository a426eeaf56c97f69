"""A handful of tiny videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import write_video


@pytest.fixture(scope="session")
def video_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of eight H.264 videos."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(folder / f"{number}.mp4", number)
    (folder / "list.csv").write_text("".join(f"{folder}/{number}.mp4 0\n" for number in range(8)))
    return folder / "list.csv"
