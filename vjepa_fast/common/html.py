"""Builds self-contained HTML pages; all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1180px; margin: 1.5em auto; padding: 0 1em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1.2em; margin: 1.8em 0 .4em }
.tiles { display: flex; flex-wrap: wrap; gap: .7em; margin: 1em 0 }
.tiles div { border: 1px solid #d5d5d5; border-radius: 6px; padding: .4em .9em }
.tiles b { display: block; font-size: 1.25em }
.warning { border-left: 4px solid crimson; background: #fdf1f2; padding: .3em .8em; margin: .5em 0 }
.mark { background: crimson; color: white; padding: 0 .4em; font-size: .85em }
img { width: 100%; height: auto } li { margin: .15em 0 }
table { border-collapse: collapse; margin: .4em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .2em .9em .2em 0; text-align: left; vertical-align: top;
overflow-wrap: anywhere } td.number { text-align: right }
pre, code { font: .88em/1.45 ui-monospace, monospace; background: #f4f4f4; overflow-wrap: anywhere }
pre { padding: .6em .8em; white-space: pre-wrap; margin: .3em 0 } footer, .note { color: #666; font-size: .9em }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page; `body` is HTML, the title text."""
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            *body,
            "</body></html>\n",
        ]
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def warning(number: int, text: str) -> str:
    """A warning with the number that its mark has in the curves."""
    return f'<p class="warning"><span class="mark">{number}</span> {escape(text)}</p>'


def command(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def tiles(figures: Mapping[str, str]) -> str:
    """Figures by what they are of."""
    cells = (f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in figures.items())
    return f'<div class="tiles">{"".join(cells)}</div>'


def explained(terms: Mapping[str, str]) -> str:
    """A list of terms and what they mean."""
    return f"<ul>{''.join(f'<li><b>{escape(term)}</b>: {escape(text)}</li>' for term, text in terms.items())}</ul>"


def table(head: Sequence[str] | None, rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Args: numbers: all columns but the first are."""
    lines = [] if head is None else [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for row in rows:
        cells = (
            f"<td{' class=number' if numbers and place else ''}>{escape(cell)}</td>" for place, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def more(count: int, shown: int, where: str) -> Iterator[str]:
    """Where the rest of a list is that is not shown as a whole."""
    if count > shown:
        yield paragraph(f"{count - shown} more are in {where}.", "note")


def image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def folded(summary: str, text: str) -> str:
    """Text that is shown on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
