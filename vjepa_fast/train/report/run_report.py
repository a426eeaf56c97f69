"""Writes report.html: what was trained, the curves, the warnings, and how to continue.

    python -m vjepa_fast.train.report runs/demo

makes it anew, also while the run goes on or after it was killed. It is made from files of the run folder only, and the
page needs no other file and no network. Whatever stands in those files is shown as text.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from vjepa_fast.common import html
from vjepa_fast.common.atomic import write_text
from vjepa_fast.common.errors import UserError
from vjepa_fast.train.report import run_json
from vjepa_fast.train.report.sections import PICTURE, body

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder, and loss.png, if the log holds a step.

    Args:
        folder: of a run of `vjepa-fast train`; what a kill left of it will do.

    Returns:
        Where the page is.

    Raises:
        UserError: the folder holds no run, or cannot be written.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        what = "has neither config.yaml nor metrics.jsonl in it" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} {what}; expected a run folder, as `vjepa-fast train --out DIR` makes one")
    path = folder / REPORT
    text = html.document(f"Run {folder.resolve().name}", body(folder.resolve()))
    # File names need not be valid UTF-8; a page has to be.
    write_text(path, text.encode("utf-8", "replace").decode())
    return path


def conclude(folder: Path, step: int, how: str, say: Callable[[str], object]) -> None:
    """Record the end of a run and write its report.

    A failure to write the report is logged as a warning; it never fails the run.

    Args:
        folder: run folder.
        step: steps done.
        how: outcome of the run, such as `interrupted`.
        say: prints a line.
    """
    try:
        run_json.end(folder, step, how)
        path = write_report(folder)
    except Exception as error:
        say(f"WARNING: no report of the run: {error or type(error).__name__}")
        return
    picture = folder / PICTURE
    say(f"report {path}" + (f", curve {picture}" if picture.exists() else ""))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vjepa_fast.train.report", description="The page about a run.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    try:
        path = write_report(parser.parse_args().folder)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(os.fsencode(path).decode(errors="replace"))
