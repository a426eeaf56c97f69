"""How far two runs are from each other."""

from __future__ import annotations

import csv
from pathlib import Path

import torch


def column(path: Path) -> list[float]:
    """The losses in a log."""
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor over its norm."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).norm() / b[key].norm().clamp_min(1e-12)) for key in a)
