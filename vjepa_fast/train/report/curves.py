"""Reads a run's logs, thins out long ones, and plots the curves.

Two pictures: what is learnt (loss, loss by place, health of the features; loss.png), and how training goes (gradients,
schedules, speed). Steps are counted from 1. A panel whose figures the log lacks says so.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_POINTS = 2000
"""Of a line; more than a picture has pixels for."""
MAX_WINDOW = 300
"""Steps that a smoothed curve is the mean of."""
MAX_MARKS = 20
"""Warnings that are marked."""

_COLUMNS = ("step", "loss", "iter-time(ms)", "dataload-time(ms)", "lr", "momentum", "grad_norm", "clips_per_s")
_PLACE = re.compile(r"loss_(mask|slot)(\d{1,4})")
_WARM_UP = 3
"""First steps of a log that its speed leaves out."""
_GREATEST = 1e30
"""What is larger is drawn as not finite."""


@dataclass(frozen=True)
class Curves:
    """Figures of a run."""

    columns: dict[str, np.ndarray]
    """Of every step in its order, by the names of log_r0.csv, fp64; nan where a figure is not finite. `step` counts
    from 1."""
    rows: list[dict[str, Any]]
    """At most about MAX_POINTS lines of metrics.jsonl, one a step, in the order of `step`, which counts from 0."""
    num_damaged: int
    """Lines of metrics.jsonl that cannot be read."""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure of metrics.jsonl, where it is finite."""
        found = [(row["step"] + 1, row[key]) for row in self.rows if _is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def window(self) -> int:
        """Steps that a smoothed curve is the mean of; few enough that it does not lag behind."""
        return max(1, min(MAX_WINDOW, len(self) // 30))

    def speed(self) -> tuple[float, float]:
        """Clips a second, and the share of the time that was waited for clips, after the first steps; nan: unknown."""
        first = _WARM_UP if len(self) > _WARM_UP else 0
        seconds, wait, rate = (
            self.columns[name][first:] for name in ("iter-time(ms)", "dataload-time(ms)", "clips_per_s")
        )
        known = np.isfinite(seconds) & np.isfinite(wait) & np.isfinite(rate)
        total = seconds[known].sum()
        if not total > 0:
            return math.nan, math.nan
        return float((rate * seconds)[known].sum() / total), float(wait[known].sum() / total)


def read_curves(folder: Path) -> Curves:
    """The logs in a run folder; of steps that are there twice the later figures count. Files may be missing, and lines
    cut short."""
    rows, num_damaged = _read_rows(folder / "metrics.jsonl")
    table = _read_table(folder / "log_r0.csv")
    if not len(table):
        table = np.array([[row[name] if _is_number(row.get(name)) else math.nan for name in _COLUMNS] for row in rows])
    table = table.reshape(-1, len(_COLUMNS))[::-1]
    _, last = np.unique(table[:, 0], return_index=True)
    table = np.where(np.abs(table[last]) < _GREATEST, table[last], math.nan)
    table[:, 0] += 1
    return Curves(dict(zip(_COLUMNS, table.T, strict=True)), rows, num_damaged)


def _read_table(path: Path) -> np.ndarray:
    values = array("d")
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            # Files of this name are written by the reference too, with fewer columns.
            places = [header.index(name) for name in _COLUMNS if name in header]
            for line in lines if len(places) == len(_COLUMNS) else ():
                try:
                    row = [float(line[place]) for place in places]
                except (ValueError, IndexError):
                    continue
                if math.isfinite(row[0]):
                    values.extend(row)
    except (OSError, csv.Error):
        pass
    return np.array(values).reshape(-1, len(_COLUMNS))


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [], 0
    every, rows, num_damaged = _every(len(lines)), {}, 0
    for line in lines[: len(lines) - 1 : every] + lines[-1:]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows[int(row["step"])] = row
        else:
            num_damaged += 1
    return [rows[step] | {"step": step} for step in sorted(rows)], num_damaged


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _GREATEST


def _every(count: int) -> int:
    return max(1, -(-count // MAX_POINTS))


def draw_learning(curves: Curves, marks: Sequence[int] = ()) -> bytes:
    """Loss, loss by place and health of the features: a PNG.

    Args:
        curves: of a run, at least one step.
        marks: steps of warnings, marked with their numbers, from 1.
    """
    figure, ((loss, places, explained), (spread, ranks, cosine)) = _figure(2, wspace=0.25)
    _steps(loss, curves, "loss", "tab:blue")
    loss.set(title="Prediction loss", ylabel="loss")
    _places(places, curves)
    _lines(explained, curves, {"explained": "tab:red"})
    explained.set(title="Share of the targets' variance explained", ylabel="explained (0: a constant)", ylim=(-0.5, 1))
    _lines(spread, curves, {"target_std": "tab:green", "context_std": "tab:olive", "prediction_std": "tab:orange"})
    spread.set(title="Spread of features (0: collapse)", ylabel="std over tokens", ylim=(0, None))
    _lines(ranks, curves, {"target_rank": "tab:green", "context_rank": "tab:olive", "prediction_rank": "tab:orange"})
    ranks.set(title="Directions in use (1: collapse)", ylabel="effective rank", ylim=(0, None))
    _lines(cosine, curves, {"clip_cosine": "tab:purple"})
    cosine.set(
        title="Mean targets of two clips", ylabel="cosine", ylim=(min([0.0, *curves.series("clip_cosine")[1]]), 1.05)
    )
    return _png(figure, curves, marks)


def draw_training(curves: Curves, marks: Sequence[int] = ()) -> bytes:
    """Norms of gradients, schedules and speed; as draw_learning."""
    figure, (gradients, schedule, speed) = _figure(1, wspace=0.38)
    _steps(gradients, curves, "grad_norm", "tab:grey", smooth=False)
    _lines(gradients, curves, {"grad_norm_encoder": "tab:blue", "grad_norm_predictor": "tab:orange"})
    if any((line.get_ydata() > 0).any() for line in gradients.lines):
        gradients.set_yscale("log")
    gradients.set(title="Norms of gradients", ylabel="norm")
    every = _every(len(curves))
    steps = curves.columns["step"][::every]
    for axes, name, colour, label in (
        (schedule, "lr", "tab:blue", "learning rate"),
        (schedule.twinx(), "momentum", "tab:red", "momentum (target encoder)"),
    ):
        axes.plot(steps, curves.columns[name][::every], color=colour)
        axes.set_ylabel(label, color=colour)
    schedule.set(title="Schedules", ylim=(0, None))
    schedule.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _steps(speed, curves, "clips_per_s", "tab:green")
    speed.set(title="Speed", ylim=(0, None))
    speed.set_ylabel("clips/s", color="tab:green")
    wait, time = (
        running_mean(curves.columns[name], curves.window)[::every] for name in ("dataload-time(ms)", "iter-time(ms)")
    )
    right = speed.twinx()
    right.plot(steps, 100 * wait / np.where(time > 0, time, math.nan), color="tab:brown", linewidth=1)
    right.set(ylim=(0, 100))
    right.set_ylabel("waiting for clips, % of the time", color="tab:brown")
    return _png(figure, curves, marks)


def _figure(num_rows: int, wspace: float) -> tuple[Any, Any]:
    # Not through pyplot, which would look for a display. Fixed margins: to measure them takes as long as to draw.
    from matplotlib.figure import Figure

    height = 3.7 * num_rows
    figure = Figure(figsize=(14.5, height))
    panels = figure.subplots(num_rows, 3)
    figure.subplots_adjust(left=0.05, right=0.955, bottom=0.5 / height, top=1 - 0.4 / height, wspace=wspace, hspace=0.3)
    return figure, panels


def _png(figure: Any, curves: Curves, marks: Sequence[int]) -> bytes:
    # Those with a second scale have an axis more, which comes behind all others.
    panels = [axes for axes in figure.axes if axes.get_title()]
    for axes in figure.axes:
        # Ticks are most of the work.
        if axes.get_yscale() == "linear":
            axes.locator_params(axis="y", nbins=5)
    for axes in panels:
        # The same steps in all, so that they can be read one below the other.
        axes.set(xlabel="step", xlim=(0, 1.02 * max(2.0, float(curves.columns["step"][-1]))))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
        if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines) and not axes.collections:
            axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color="grey")
        for number, step in enumerate(marks[:MAX_MARKS], 1):
            axes.axvline(step, color="crimson", linestyle="--", linewidth=1)
            axes.text(
                step,
                0.99,
                str(number),
                transform=axes.get_xaxis_transform(),
                color="white",
                fontsize=8,
                va="top",
                ha="center",
                bbox={"facecolor": "crimson", "edgecolor": "none", "pad": 1.5},
            )
        labels = axes.get_legend_handles_labels()[1]
        if 1 < len(labels) <= 16:
            axes.legend(fontsize="small", ncols=2 if len(labels) > 6 else 1, framealpha=0.6)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png", metadata={"Software": None})
    return png.getvalue()


def _steps(axes: Any, curves: Curves, name: str, colour: str, smooth: bool = True) -> None:
    """A figure of every step, and its running mean; of long runs the range that it has in a few steps."""
    steps, values, window = curves.columns["step"], curves.columns[name], curves.window
    every = _every(len(steps))
    mean = f"mean of {window} steps"
    if every > 1:
        whole = len(values) // every * every
        pieces = np.where(np.isfinite(values[:whole]), values[:whole], math.nan).reshape(-1, every)
        known = np.isfinite(pieces).any(1)
        low, high = np.nanmin(pieces[known], 1), np.nanmax(pieces[known], 1)
        # With an edge, or a single high step would be narrower than a pixel.
        axes.fill_between(
            steps[:whole:every][known], low, high, color=colour, alpha=0.3, linewidth=0.8, label="range of steps"
        )
    else:
        axes.plot(
            steps, values, color=colour, linewidth=0.8, alpha=0.35 if window > 1 and smooth else 1, label="each step"
        )
    if window > 1 and smooth or every > 1:
        axes.plot(steps[::every], running_mean(values, window)[::every], color=colour, label=mean)


def _lines(axes: Any, curves: Curves, colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        steps, values = curves.series(name)
        if steps:
            marker = "." if len(steps) <= 100 else ""
            axes.plot(steps, np.array(values), color=colour, marker=marker, label=name.replace("_", " "), linewidth=1.2)


def _places(axes: Any, curves: Curves) -> None:
    """Loss by mask and by time slot, of the steps with a line in the log."""
    from matplotlib import colormaps

    found = sorted(
        {(match[1], int(match[2]), match[0]) for row in curves.rows for key in row if (match := _PLACE.fullmatch(key))}
    )
    slots = [number for kind, number, _ in found if kind == "slot"]
    for kind, number, key in found[:80]:
        style: dict[str, Any] = {"linestyle": "--", "color": f"C{number % 10}"}
        named = True
        if kind == "slot":
            # From dark to light as time goes on; of many the ends tell which is which.
            style = {"color": colormaps["viridis"](0.95 * number / max(1, slots[-1]))}
            named = len(slots) <= 10 or number in (slots[0], slots[-1])
        axes.plot(*curves.series(key), label=f"{kind} {number}" if named else None, linewidth=1.2, **style)
    axes.set(title="Loss by mask (dashed) and by tubelet in time", ylabel="loss")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` finite values at every place, over fewer at the beginning; nan where there is none."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[width:] -= sums[:-width].copy()
    counts[width:] -= counts[:-width].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
