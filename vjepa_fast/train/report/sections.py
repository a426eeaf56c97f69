"""The sections of report.html, each from the files of a run folder."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.checkpoints.run_folder import newest_checkpoint
from vjepa_fast.common import html
from vjepa_fast.common.atomic import atomic_path, disk_errors
from vjepa_fast.common.errors import UserError
from vjepa_fast.config import yaml_io
from vjepa_fast.config.differences import from_nearest_recipe
from vjepa_fast.train.report import run_json
from vjepa_fast.train.report.curves import MAX_MARKS, Curves, draw_learning, draw_training, read_curves

PICTURE = "loss.png"
MAX_LISTED = 20
"""Entries of a list that are shown."""


_HOW_TO_READ = {
    "Loss": "should fall, but that alone says little: it falls fastest when all features become the same.",
    "Explained": "the share of what differs between targets that is predicted. 0 is the best constant answer; above it "
    "something is learnt. It begins far below 0, outside the picture.",
    "Spread, directions": "near 0, or at 1 direction, features have collapsed. Targets follow the context's features.",
    "Cosine": "between the mean targets of two clips; at 1 they are the same. The demo learns with 0.99.",
}
"""Of the first picture."""


@dataclass(frozen=True)
class _Run:
    """What is in a run folder."""

    folder: Path
    config: dict[str, Any]
    """config.yaml; empty if it cannot be read."""
    starts: list[dict[str, Any]]
    """run.json; empty for a run of an earlier version."""
    curves: Curves
    warnings: list[dict[str, Any]]

    def get(self, key: str) -> Any:
        """Value of a key of the config; None where it has no such key."""
        section, _, name = key.partition(".")
        found = self.config.get(section)
        return found.get(name) if isinstance(found, dict) else None

    def about(self, key: str) -> Any:
        """What run.json says about the last start; None where it says nothing."""
        return self.starts[-1].get(key) if self.starts else None

    @property
    def steps(self) -> int:
        """Steps done."""
        logged, told = int(self.curves.columns["step"][-1]) if len(self.curves) else 0, self.about("to_step")
        return max(logged, told) if _is_int(told) else logged

    @property
    def total(self) -> int | None:
        """Steps of the schedules, if that is known."""
        epochs, ipe = self.get("optimization.epochs"), self.get("optimization.ipe")
        return epochs * ipe if _is_int(epochs) and _is_int(ipe) else None


def body(folder: Path) -> Iterator[str]:
    """The sections in their order."""
    notes: list[str] = []
    try:
        config = yaml_io.read(folder / "config.yaml")
    except UserError as error:
        config = {}
        notes.append(f"What was trained is not known: {error}.")
    found = [line for line in _json_lines(folder / "warnings.jsonl") if _is_int(line.get("step"))]
    run = _Run(folder, config, run_json.read(folder), read_curves(folder), found)
    if run.curves.num_damaged:
        count = run.curves.num_damaged
        notes.append(
            f"{count} line{'s' if count > 1 else ''} of metrics.jsonl cannot be read and "
            f"{'are' if count > 1 else 'is'} left out; a kill can cut the last one short."
        )
    if not len(run.curves):
        notes.append(_why_no_step(folder))
    yield html.paragraph(_status(run))
    yield from (html.paragraph(note, "note") for note in notes)
    yield html.tiles(_figures(run))
    yield from _warnings(run)
    if len(run.curves):
        yield from _pictures(run)
    yield from _what(run)
    if config:
        yield from _settings(run)
    yield from _probe(run)
    yield from _broken(folder)
    yield from _going_on(run)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    again = f"python -m vjepa_fast.train.report {shlex.quote(str(folder))}"
    yield html.paragraph(f"Made {made} from the files in the run folder; rebuild with: {again}", "note")


def _why_no_step(folder: Path) -> str:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return "There is no metrics.jsonl: the run did not come to the end of its first step, or the file was deleted."
    if path.stat().st_size == 0:
        return "metrics.jsonl is empty: the run did not come to the end of its first step."
    return "metrics.jsonl has no line that can be read: the run was killed at its first step, or the file is damaged."


def _status(run: _Run) -> str:
    of = f"step {run.steps}" + (f" of {run.total}" if run.total else "")
    if not run.starts:
        return f"The log ends at {of}; how the run ended is not on record."
    how = run.about("how")
    if how is None:
        return (
            f"The log ends at {of}. No end is on record: the run was killed, or was still going when this page was "
            "made."
        )
    stop = run.get("train.max_steps")
    asked = f" (train.max_steps={stop})" if stop == run.steps != run.total else ""
    return f"Ended at {of}{asked}: {how}."


def _figures(run: _Run) -> dict[str, str]:
    curves = run.curves
    figures = {"steps": f"{run.steps} of {run.total}" if run.total else str(run.steps)}
    losses = curves.columns["loss"][np.isfinite(curves.columns["loss"])]
    if len(losses):
        figures["loss, first and last"] = f"{losses[0]:.3f} to {losses[-curves.window :].mean():.3f}"
    explained, ranks = curves.series("explained")[1], curves.series("target_rank")[1]
    if explained:
        figures["explained at the end"] = f"{round(100 * explained[-1])} %"
    if ranks:
        figures["effective rank of the targets"] = f"{ranks[-1]:.0f}"
    rate, wait = curves.speed()
    if math.isfinite(rate):
        seconds = round(np.nansum(curves.columns["iter-time(ms)"]) / 1e3)
        figures |= {
            "clips/s": f"{rate:.1f}",
            "waiting for clips": f"{100 * wait:.1f} %",
            "time of all steps": str(timedelta(seconds=seconds)),
        }
    return figures | {"warnings": str(len(run.warnings))}


def _warnings(run: _Run) -> Iterator[str]:
    yield html.heading("Warnings")
    if not run.warnings:
        yield html.paragraph("None.")
    for number, found in enumerate(run.warnings[:MAX_MARKS], 1):
        yield html.warning(number, f"step {found['step']}: {found.get('warning', found.get('kind', ''))}")
    yield from html.more(len(run.warnings), MAX_MARKS, "warnings.jsonl")


def _pictures(run: _Run) -> Iterator[str]:
    marks = [found["step"] for found in run.warnings]
    learning = draw_learning(run.curves, marks)
    with disk_errors(run.folder / PICTURE), atomic_path(run.folder / PICTURE) as temporary:
        temporary.write_bytes(learning)
    yield html.heading("Is it learning?")
    yield html.image(learning, "Curves of the loss and of the health of the features, as described below")
    yield html.explained(_HOW_TO_READ)
    if run.get("model.objective") == "pixels":
        yield html.paragraph(
            "This run predicts pixels. Its targets are those of the masked tubelets, each colour "
            "normalised over its tubelet, and do not depend on the model."
        )
    yield html.heading("How does training go?")
    yield html.image(draw_training(run.curves, marks), "Curves of gradient norms, schedules and speed")
    if marks:
        yield html.paragraph("Dashed lines with a number mark the steps of the warnings above.", "note")


def _what(run: _Run) -> Iterator[str]:
    yield html.heading("What was trained")
    rows: dict[str, Any] = {}
    if run.config:
        sizes = [
            f"{name} {run.about(f'{name}_parameters') / 1e6:.1f} M"
            for name in ("encoder", "predictor")
            if _is_int(run.about(f"{name}_parameters"))
        ]
        videos, clips, images = (run.about(key) for key in ("videos", "clips_a_step", "images_a_step"))
        datasets = _as_list(run.about("manifests")) or _as_list(run.get("data.datasets"))
        rows = {
            "model": str(run.get("model.model_name")) + (f" ({', '.join(sizes)} parameters)" if sizes else ""),
            "predicts": "pixels of the masked tubelets"
            if run.get("model.objective") == "pixels"
            else "features of the masked tubelets, as the target encoder has them",
            "data": (f"{videos} videos: " if _is_int(videos) else "") + _listed(datasets),
            "clips": f"{_listed(_as_list(run.get('data.dataset_fpcs')))} frames, "
            f"{' x '.join(map(str, _as_list(run.get('data.crop_size'))))} pixels"
            + (f", {run.get('data.fps'):g} frames/s" if isinstance(run.get("data.fps"), (int, float)) else "")
            + (f"; {clips} a step" if _is_int(clips) else "")
            + (f", and {images} images" if images else ""),
            "precision, seed": f"{run.get('train.dtype')}, {run.get('train.seed')}",
        }
    many, versions = run.about("processes"), run.about("versions")
    if run.starts:
        rows["hardware"] = (f"{many} x " if _is_int(many) and many > 1 else "") + str(run.about("hardware"))
    if isinstance(versions, dict):
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield html.table(None, [[name, str(text)] for name, text in rows.items()])
    if not run.starts:
        yield html.paragraph("Hardware, versions and dates are not on record: there is no run.json.", "note")
        return
    shown = run.starts[-MAX_LISTED:]
    keys = {"began": "started", "from_step": "at step", "ended": "ended", "to_step": "at step", "how": "how"}
    yield html.table(list(keys.values()), [[str(start.get(key, "")) for key in keys] for start in shown])
    if len(shown) < len(run.starts):
        yield html.paragraph(f"{len(run.starts) - len(shown)} earlier starts are in {run_json.RECORD}.", "note")


def _settings(run: _Run) -> Iterator[str]:
    yield html.heading("Settings")
    recipe, found = from_nearest_recipe(run.config)
    if found:
        yield html.paragraph(
            f"The nearest of the packaged recipes is {recipe}; different from it {'is' if len(found) == 1 else 'are'}:"
        )
        yield html.table(
            ["key", recipe, "this run"],
            [[one.key, yaml_io.describe(one.recipe), yaml_io.describe(one.config)] for one in found],
        )
    else:
        yield html.paragraph(f"Those of the recipe {recipe}.")
    yield html.folded("All settings (config.yaml)", yaml_io.write(run.config))


def _probe(run: _Run) -> Iterator[str]:
    path = run.folder / "probe.json"
    if not path.is_file():
        return
    yield html.heading("What probes read out of the features")
    try:
        scores = json.loads(path.read_bytes())
        names = list(dict.fromkeys(name for row in scores.values() for name in row))
        rows = [
            [str(what), *(f"{row[name]:.2f}" if name in row else "" for name in names)] for what, row in scores.items()
        ]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        yield html.paragraph("probe.json cannot be read: it is damaged, or of another kind.", "note")
        return
    yield html.paragraph("Linear probes, scored on held-out videos: 1 is perfect, an R2 of 0 is that of the mean.")
    yield html.table(
        ["features", *(name.replace("_r2", " R2").replace("_", " ") for name in names)], rows, numbers=True
    )
    if run.starts and run.about("how") != "finished":
        yield html.paragraph("Measured at an earlier end of this run.", "note")


def _broken(folder: Path) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for path in sorted(folder.glob("broken_r*.tsv")):
        try:
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows += [tuple(row) for row in csv.reader(file, delimiter="\t")][1:]
        except (OSError, csv.Error):
            rows.append(("", str(path), "this list cannot be read"))
    rows = list(dict.fromkeys(rows))
    if rows:
        yield html.heading("Videos that could not be used")
        yield html.paragraph(f"{len(rows)}; others took their places.")
        yield html.table(["dataset", "path", "reason"], rows[:MAX_LISTED])
        yield from html.more(len(rows), MAX_LISTED, "broken_r*.tsv")
    bad = {
        line["step"]
        for path in folder.glob("bad_steps_r*.jsonl")
        for line in _json_lines(path)
        if _is_int(line.get("step"))
    }
    if bad:
        yield html.heading("Steps that went wrong")
        yield html.paragraph(
            f"{len(bad)}, between step {min(bad) + 1} and {max(bad) + 1}: gradients that are not "
            "finite, or losses far above those before (bad_steps_r*.jsonl)."
        )


def _going_on(run: _Run) -> Iterator[str]:
    yield html.heading("How to go on")
    there, many, stop = shlex.quote(str(run.folder)), run.about("processes"), run.get("train.max_steps")
    again = f"vjepa-fast train --config {shlex.quote(str(run.folder / 'config.yaml'))} --out {there} --resume"
    if _is_int(many) and many > 1:
        again += f" --nproc {many}"
    if _is_int(stop) and (run.total is None or stop < run.total):
        again += " train.max_steps=null"
    checkpoint = newest_checkpoint(run.folder)
    if checkpoint is not None and run.total is not None and run.steps >= run.total:
        yield html.paragraph("All steps of the schedules are done.")
    else:
        what = "Train on" if checkpoint is not None else "There is no checkpoint yet. Start once more"
        yield html.paragraph(
            f"{what}, in the folder that the run was started from (with torchrun or srun, if it was started so):"
        )
        yield html.command(again)
    if checkpoint is None:
        return
    manifests, held_out = _as_list(run.about("manifests")), run.about("held_out")
    videos = str(manifests[0]) if manifests else "videos.csv"
    train, val = ("train.csv", "val.csv") if held_out is None else (videos, str(held_out))
    yield html.paragraph("Write features of videos down:")
    yield html.command(
        f"vjepa-fast embed {shlex.quote(videos)} --checkpoint {there} "
        f"--out {shlex.quote(str(run.folder / 'features.safetensors'))}"
    )
    yield html.paragraph(
        "Measure what a probe reads out of the features"
        + (" of labelled videos of yours:" if held_out is None else ":")
    )
    yield html.command(
        f"vjepa-fast probe --checkpoint {there} --train {shlex.quote(train)} --val {shlex.quote(val)} "
        f"--out {shlex.quote(str(run.folder / 'probe'))}"
    )


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _listed(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:MAX_LISTED]))
    return shown if len(values) <= MAX_LISTED else f"{shown}, and {len(values) - MAX_LISTED} more"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
