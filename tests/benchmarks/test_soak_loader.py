"""What the loader holds does not grow with the clips it has given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.soak_loader import as_markdown, make_videos, soak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_stay(tmp_path: Path) -> None:
    rows = soak(make_videos(tmp_path, "libx264"), "pyav", 2400, 1, num_points=3)
    assert [row[0] for row in rows] == [320, 800, 1600, 2400]
    text = as_markdown(rows).splitlines()
    assert len(text) == 2 + len(rows) and len({line.count("|") for line in text}) == 1
    # The pixels of the 130 batches between these rows are 204 MB; the allocators take up to 100 MB in the first
    # thousands of clips, and no more later.
    for column in range(1, 5):
        assert rows[3][column] - rows[0][column] < 140
    assert rows[3][5] <= rows[0][5] + 10
