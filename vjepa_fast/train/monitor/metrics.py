"""Writes a run's metrics: CSV with the reference's columns first, JSON lines, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vjepa_fast.common.atomic import disk_errors, write_text
from vjepa_fast.common.errors import ConfigError

COLUMNS = (
    "epoch",
    "itr",
    "loss",
    "iter-time(ms)",
    "gpu-time(ms)",
    "dataload-time(ms)",
    "step",
    "lr",
    "weight_decay",
    "momentum",
    "grad_norm",
    "skipped",
    "clips_per_s",
)
"""The first six are the reference's; gpu-time is the wall time of the training step on a CPU, dataload-time
what that step waited for its clips (vjepa_fast.train.speed.step_timer)."""


class MetricsLog:
    """Files of one process in the run folder.

    Args:
        folder: run folder.
        rank: of this process; only the first writes JSON lines and TensorBoard.
        start_step: rows of this step and later, left by a run that went on after its last checkpoint, are dropped.
        tensorboard: also write TensorBoard events.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
        UserError: here and while writing: the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, rank: int, start_step: int, tensorboard: bool = False) -> None:
        self.csv_path = folder / f"log_r{rank}.csv"
        self.jsonl_path = folder / "metrics.jsonl"
        self.is_first = rank == 0
        self._rewind_csv(start_step)
        if self.is_first:
            self._rewind_jsonl(start_step)
        self._tensorboard: Any = None
        if tensorboard and self.is_first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "train.tensorboard is set, but the package tensorboard is not installed; "
                    "pip install 'vjepa-fast[tensorboard]'"
                ) from error
            with disk_errors(folder / "tensorboard"):
                self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def _rewind_csv(self, start_step: int) -> None:
        if self.csv_path.exists() and self.csv_path.read_text().split("\n", 1)[0].split(",") != list(COLUMNS):
            # The reference writes a file of this name; a run that continues one of its own must not lose it.
            self.csv_path.rename(self.csv_path.with_name(self.csv_path.stem + ".before.csv"))
        rows = read_csv(self.csv_path) if start_step > 0 else []
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) < start_step)
        write_text(self.csv_path, buffer.getvalue())

    def _rewind_jsonl(self, start_step: int) -> None:
        lines = []
        if start_step > 0 and self.jsonl_path.exists():
            for line in self.jsonl_path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < start_step:
                        lines.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    # The last line of a killed run may be cut short.
                    continue
        write_text(self.jsonl_path, "".join(lines))

    def write(self, rows: Iterable[dict[str, Any]], extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Append rows (keys: COLUMNS) and, for the last of them, further values of any name.

        Returns:
            What a line of metrics.jsonl holds of the last row; numbers that are not finite are None.
        """
        rows = list(rows)
        if not rows:
            return {}
        buffer = io.StringIO()
        csv.DictWriter(buffer, COLUMNS, lineterminator="\n").writerows(
            {
                **row,
                "loss": f"{row['loss']:.9g}",
                "grad_norm": f"{row['grad_norm']:.6g}",
                "lr": f"{row['lr']:.6g}",
                "momentum": f"{row['momentum']:.8g}",
                **{key: f"{row[key]:.1f}" for key in COLUMNS[3:6] + ("clips_per_s",)},
            }
            for row in rows
        )
        with disk_errors(self.csv_path), self.csv_path.open("a", newline="") as file:
            file.write(buffer.getvalue())
        last = {**rows[-1], **(extra or {})}
        # JSON has no word for not-a-number or infinity.
        plain = {key: value if math.isfinite(value) else None for key, value in last.items()}
        if not self.is_first:
            return plain
        with disk_errors(self.jsonl_path), self.jsonl_path.open("a") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            with disk_errors(self.jsonl_path.parent / "tensorboard"):
                for key, value in last.items():
                    if key not in ("epoch", "itr", "step"):
                        self._tensorboard.add_scalar(key, value, last["step"])
        return plain

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard is not None:
            with disk_errors(self.jsonl_path.parent / "tensorboard"):
                self._tensorboard.close()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Whole rows of a log; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("clips_per_s") not in (None, "")]
