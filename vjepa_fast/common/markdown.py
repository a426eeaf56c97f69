"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    """One line of a table; a bar or a line break in a cell does not end it."""
    texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table.

    Args:
        head: titles of the columns.
        rows: their cells; a row that is too short ends in empty cells.
    """
    filled = ([*cells, *[""] * (len(head) - len(cells))] for cells in rows)
    return [row(head), "|---" * len(head) + "|", *map(row, filled)]
