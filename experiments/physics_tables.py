"""Tables and picture of experiments.physics_probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.common import markdown
from vjepa_fast.data.generated.physics_scenes import KINDS

QUANTITIES = ("position", "velocity", "time to contact", "hidden", "law")
"""Of the main disc: its place in the last frame of a clip, its mean velocity over the clip and the time to its next
contact, all as R2. As balanced accuracy: which disc is hidden in the last frame, and which law moves them (KINDS)."""

CLASSES = {"hidden": 4, "law": len(KINDS)}
"""Quantities that are classes, and how many."""

OBJECTIVES = ("latent", "pixels")
"""What is trained."""


def gather(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Row of the table -> quantity -> one value a seed."""
    rows: dict[str, dict[str, list[float]]] = {}
    for name in (*OBJECTIVES, "untrained"):
        for which in ("encoder", "target encoder"):
            own = [one["scores"][which] for one in runs if one["objective"] == name and which in one["scores"]]
            for read_out in ("mean", "last") if own else ():
                label = f"{name}{', target' if which != 'encoder' else ''}, {read_out}"
                rows[label] = {q: [one[read_out][q] for one in own] for q in QUANTITIES}
    raw = next(one["pixels"] for one in runs if "pixels" in one)
    rows["raw pixels, 16 x 16, all frames"] = {q: [raw[q]] for q in QUANTITIES}
    return rows


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean, and the spread from the least to the largest seed."""
    texts = []
    for name, row in rows.items():
        cells = [f"{np.mean(v):.2f}" + (f" ({min(v):.2f} to {max(v):.2f})" if len(v) > 1 else "") for v in row.values()]
        texts.append([name, *cells])
    return "\n".join(markdown.table(["features", *QUANTITIES], texts))


def margins(rows: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: trained less untrained, and in standard deviations of the difference between two seeds."""
    texts = []
    for name in rows:
        which, _, read_out = name.rpartition(", ")
        beside = rows.get(f"untrained, {read_out}")
        if beside is None or which == "untrained":
            continue
        cells = [name]
        for quantity in QUANTITIES:
            own, other = rows[name][quantity], beside[quantity]
            margin, cell = np.mean(own) - np.mean(other), ""
            if len(own) > 1 and len(other) > 1:
                cell = f" ({margin / np.hypot(np.std(own, ddof=1), np.std(other, ddof=1)):.1f} std)"
            cells.append(f"{margin:+.2f}{cell}")
        texts.append(cells)
    return "\n".join(markdown.table(["less untrained", *QUANTITIES], texts))


def lengths(runs: list[dict[str, Any]]) -> str:
    """How long each objective was trained."""
    said = []
    for name in OBJECTIVES:
        own = [one for one in runs if one["objective"] == name]
        said.append(
            f"{name} {np.mean([one['steps'] for one in own]):.0f} steps in "
            f"{np.mean([one['minutes'] for one in own]):.1f} minutes"
        )
    return ", ".join(said)


def ranks(runs: list[dict[str, Any]]) -> str:
    """Of each kind of encoder, least to largest over the seeds."""
    said: dict[str, list[float]] = {}
    for one in runs:
        for which, rank in one["rank"].items():
            said.setdefault(one["objective"] + (", target" if which != "encoder" else ""), []).append(rank)
    return "; ".join(f"{name} {min(values):.1f} to {max(values):.1f}" for name, values in said.items())


def plot(rows: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Bars with the spread of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 4 * len(QUANTITIES), 4
    figure, panels = plt.subplots(1, len(QUANTITIES), figsize=size, layout="constrained", sharey=True)
    names = list(rows)
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        values = [np.array(rows[name][quantity]) for name in names]
        means = np.array([v.mean() for v in values])
        spread = np.array([[m - v.min(), v.max() - m] for m, v in zip(means, values, strict=True)]).T
        axes.barh(names, means.clip(-0.2), xerr=spread, color=[f"C{i // 2}" for i in range(len(names))])
        axes.set(title=quantity, xlabel="balanced accuracy" if quantity in CLASSES else "R2", xlim=(-0.2, 1))
        axes.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    figure.savefig(out, dpi=110)
    plt.close(figure)
