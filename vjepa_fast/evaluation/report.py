"""Writes the results of a frozen evaluation: results.json, probe.pt, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common.atomic import atomic_path, disk_errors, write_text
from vjepa_fast.evaluation.labels import Labels
from vjepa_fast.evaluation.metrics import confusion

RESULTS, PROBE, CURVES, CONFUSION, SCATTER = "results.json", "probe.pt", "curves.png", "confusion.png", "predicted.png"
_DPI = 110
_MAX_LABELLED = 40
_MAX_NUMBERED = 15
_MAX_PANELS = 9


def write_probe(path: Path, states: Sequence[Mapping[str, Tensor]], details: Mapping[str, Any], labels: Labels) -> None:
    """Attentive probes in Meta's layout, with what `vjepa-fast convert --probe` needs.

    Args:
        path: of the file.
        states: state dict of every head.
        details: of the result.
        labels: of both splits.
    """
    own = {
        "config": {},
        "probe_heads": details["num_heads"],
        "best_head": details["best_head"],
        "targets": labels.targets,
        "output_scale": details["output_scale"],
        "output_shift": details["output_shift"],
        "labels": {str(place): str(number) for place, number in enumerate(labels.classes)},
    }
    with disk_errors(path, advice="give the command once more"), atomic_path(path) as temporary:
        torch.save({"classifiers": list(states), "epoch": details["epochs"], "vjepa_fast": own}, temporary)


def write_json(folder: Path, content: Mapping[str, Any]) -> None:
    """results.json; numbers that JSON does not have become null."""
    write_text(folder / RESULTS, json.dumps(_plain(content), indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with disk_errors(path, advice="give the command once more"), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def draw_curves(path: Path, details: Mapping[str, Any], score: str) -> None:
    """Training loss and validation score of every head by epoch.

    Args:
        path: of the PNG.
        details: of the result of attentive probes.
        score: name of the score.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heads, best, val_score = details["heads"], details["best_head"], details["val_score_by_epoch"]
    rates = sorted({head["lr"] for head in heads})
    shades = {rate: colormaps["viridis"](0.9 * place / max(1, len(rates) - 1)) for place, rate in enumerate(rates)}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, curves in ((left, details["train_loss_by_epoch"]), (right, val_score)):
        values = np.where(np.isfinite(curves), curves, np.nan)
        epochs = np.arange(1, len(values) + 1)
        for number, head in enumerate(heads):
            if number != best:
                axes.plot(epochs, values[:, number], color=shades[head["lr"]], linewidth=0.9, alpha=0.6)
        axes.plot(epochs, values[:, best], color="tab:red", linewidth=2.2)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="training loss")
    right.set(ylabel=f"validation {score}")
    if score == "r2":
        # What is far worse than the mean would hide the rest.
        low = np.nanmin(np.where(np.isfinite(val_score), val_score, np.nan))
        right.set_ylim(max(-1.0, float(low) - 0.05), 1.02)
    else:
        right.set_ylim(0, 1.02)
    lines = [
        Line2D(
            [],
            [],
            color="tab:red",
            linewidth=2.2,
            label=f"best at the end: lr {heads[best]['lr']:g}, decay {heads[best]['weight_decay']:g}",
        )
    ]
    lines += [Line2D([], [], color=shades[rate], label=f"lr {rate:g}") for rate in rates]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 6), fontsize=8)
    figure.suptitle(
        f"{len(heads)} attentive {'probe' if len(heads) == 1 else 'probes'} of depth {details['depth']}", fontsize=11
    )
    save_figure(figure, path)


def draw_confusion(path: Path, labels: Labels, outputs: Tensor, name: str) -> None:
    """Which classes are taken for which, as shares of each class.

    Args:
        path: of the PNG.
        labels: of both splits.
        outputs: [N, C] on the validation set.
        name: of the probe, for the title.
    """
    from matplotlib.figure import Figure

    counts = confusion(outputs.argmax(1), labels.val.labels, len(labels.classes)).numpy()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = min(9.0, max(4.6, 0.32 * len(counts) + 2.2))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(counts) <= _MAX_LABELLED:
        for axis in ("x", "y"):
            getattr(axes, f"set_{axis}ticks")(range(len(counts)), labels.classes)
    if len(counts) <= _MAX_NUMBERED:
        for row, column in np.argwhere(counts > 0):
            axes.text(
                column,
                row,
                counts[row, column],
                ha="center",
                va="center",
                fontsize=9,
                color="white" if shares[row, column] > 0.55 else "black",
            )
    axes.set_title(f"{name}: {np.trace(counts)} of {counts.sum()} right", fontsize=11)
    save_figure(figure, path)


def draw_scatter(path: Path, labels: Labels, outputs: Tensor, scores: Mapping[str, Any], name: str) -> None:
    """Predicted numbers over true ones, a panel a target.

    Args:
        path: of the PNG.
        labels: of both splits.
        outputs: [N, C] on the validation set.
        scores: of these outputs.
        name: of the probe, for the title.
    """
    from matplotlib.figure import Figure

    shown = labels.targets[:_MAX_PANELS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 3.4 * rows + 0.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for number, (axes, target) in enumerate(zip(panels, shown, strict=False)):
        true, found = labels.val.labels[:, number].numpy(), outputs[:, number].numpy()
        finite = np.concatenate([true, found[np.isfinite(found)]])
        ends = [float(finite.min()), float(finite.max())]
        axes.plot(ends, ends, color="grey", linewidth=1, linestyle="--")
        axes.scatter(true, found, s=12, alpha=0.6, linewidths=0)
        axes.set_title(f"{target}: R2 {scores['r2_by_target'][target]:.2f}", fontsize=10)
        axes.set(xlabel="true", ylabel="predicted")
        axes.grid(alpha=0.3)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    left_out = len(labels.targets) - len(shown)
    figure.suptitle(name + (f" ({left_out} more targets in {RESULTS})" if left_out else ""), fontsize=11)
    save_figure(figure, path)
