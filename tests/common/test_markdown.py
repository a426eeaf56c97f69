"""Tables in Markdown."""

from __future__ import annotations

from vjepa_fast.common import markdown


def test_a_table() -> None:
    assert markdown.table(["", "ms"], [["ours", 1.5], ("theirs", 3)]) == [
        "|  | ms |",
        "|---|---|",
        "| ours | 1.5 |",
        "| theirs | 3 |",
    ]


def test_a_short_row_is_filled_up() -> None:
    assert markdown.table(["a", "b", "c"], [["x"]])[-1] == "| x |  |  |"


def test_a_cell_stays_one_cell() -> None:
    assert markdown.row(["a|b", "two\nlines"]) == "| a\\|b | two lines |"
