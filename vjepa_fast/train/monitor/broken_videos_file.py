"""Writes the list of unreadable videos in the run folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from vjepa_fast.common.atomic import write_text
from vjepa_fast.data.loader import BrokenVideo

HEADER = ("dataset", "path", "reason")


class BrokenList:
    """broken_r<rank>.tsv: one line a video, each once, over all restarts of a run.

    Args:
        folder: run folder.
        rank: of this process.
        resumed: keep what earlier parts of the run listed.
    """

    def __init__(self, folder: Path, rank: int, resumed: bool) -> None:
        self.path = folder / f"broken_r{rank}.tsv"
        self._before: list[tuple[str, ...]] = []
        self._num_listed = 0
        if resumed and self.path.exists():
            with self.path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                self._before = [tuple(row) for row in csv.reader(file, delimiter="\t")][1:]

    def write(self, broken: Sequence[BrokenVideo]) -> None:
        """Write the file anew if there are more than at the last call.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        if len(broken) == self._num_listed:
            return
        self._num_listed = len(broken)
        rows = [*self._before, *((video.dataset, video.path, video.reason) for video in broken)]
        buffer = io.StringIO()
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([HEADER, *dict.fromkeys(rows)])
        write_text(self.path, buffer.getvalue())
