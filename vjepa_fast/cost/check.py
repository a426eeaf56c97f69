"""Compares predicted with measured times, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vjepa_fast.cost.prediction import ORDER

TOLERANCE = 0.1
"""Relative difference above which a part asks for an explanation."""


@dataclass(frozen=True)
class Row:
    """One part, milliseconds a step."""

    part: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted else float("inf")


def compare(predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[Row]:
    """Rows in the order of a step, what is in neither left out, and the whole step last.

    Args:
        predicted: milliseconds by part, see Prediction.milliseconds.
        measured: the same, see vjepa_fast.train.speed.profiling.times_by_part; `other` is what lies outside all parts.
    """
    names = [*ORDER, *sorted((set(predicted) | set(measured)) - set(ORDER))]
    rows = [
        Row(name, predicted.get(name, 0.0), measured.get(name, 0.0))
        for name in names
        if name in predicted or name in measured
    ]
    return [*rows, Row("step", sum(row.predicted for row in rows), sum(row.measured for row in rows))]


def as_table(rows: list[Row]) -> str:
    """Predicted, measured and their ratio; a star marks more than TOLERANCE off."""
    width = max(len(row.part) for row in rows) + 2
    lines = ["part".ljust(width) + "predicted, ms".rjust(15) + "measured, ms".rjust(15) + "ratio".rjust(9)]
    for row in rows:
        star = " *" if abs(row.ratio - 1) > TOLERANCE else ""
        ratio = f"{row.ratio:.2f}" if row.predicted else "-"
        lines.append(f"{row.part:{width}}{row.predicted:15.2f}{row.measured:15.2f}{ratio:>9}{star}")
    return "\n".join(lines)
