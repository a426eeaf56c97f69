"""Measures prediction error by how far ahead, against copying the last features.

A model that has learned how things move is nearer to the future than the present is, and the lead grows before it is
lost in what cannot be known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError
from vjepa_fast.evaluation.prediction import KINDS, standard_error
from vjepa_fast.evaluation.report import save_figure

COLOURS = {"predicted": "tab:blue", "copied": "tab:orange", "averaged": "tab:green"}
NAMES = {"predicted": "predicted", "copied": "last features copied", "averaged": "mean of the past"}


def horizon_scores(errors: list[dict[str, Tensor]], seconds: float | None) -> dict[str, Any]:
    """Errors by tubelet of the future.

    Args:
        errors: of each video, by kind [windows, F, S].
        seconds: between two tubelets; None where rates differ.

    Returns:
        `by_horizon`: for each tubelet, from 1, the mean error of each kind over videos, its standard error, the ratio
        of predicted to copied, and the share of videos in which predicting is nearer than copying. `ratio`,
        `share_nearer`: over all tubelets.

    Raises:
        UserError: there is no video.
    """
    if not errors:
        raise UserError("none of the videos could be read")
    # [videos, F] of each kind.
    by_video = {kind: torch.stack([one[kind].double().mean((0, 2)) for one in errors]) for kind in KINDS}
    rows = []
    for tubelet in range(by_video["predicted"].shape[1]):
        own = {kind: values[:, tubelet] for kind, values in by_video.items()}
        row: dict[str, Any] = {"tubelet": tubelet + 1}
        if seconds is not None:
            row["seconds"] = (tubelet + 1) * seconds
        for kind, values in own.items():
            row[kind], row[f"{kind}_standard_error"] = float(values.mean()), standard_error(values)
        row["ratio"] = row["predicted"] / row["copied"]
        row["share_nearer"] = float((own["predicted"] < own["copied"]).double().mean())
        rows.append(row)
    means = {kind: values.mean(1) for kind, values in by_video.items()}
    return {
        "videos": len(errors),
        "by_horizon": rows,
        "ratio": float(means["predicted"].mean() / means["copied"].mean()),
        "share_nearer": float((means["predicted"] < means["copied"]).double().mean()),
    }


def draw_horizon(path: Path, scores: dict[str, Any]) -> None:
    """Errors by horizon with standard errors, and the ratio to copying.

    Args:
        path: of the PNG.
        scores: from horizon_scores.
    """
    from matplotlib.figure import Figure

    rows = scores["by_horizon"]
    in_seconds = "seconds" in rows[0]
    ahead = [row["seconds" if in_seconds else "tubelet"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in KINDS:
        left.errorbar(
            ahead,
            [row[kind] for row in rows],
            [row[f"{kind}_standard_error"] for row in rows],
            color=COLOURS[kind],
            marker="o",
            capsize=3,
            label=NAMES[kind],
        )
    left.set(ylabel="L1 distance to the features that come", ylim=(0, None))
    left.legend(loc="lower right")
    right.plot(ahead, [row["ratio"] for row in rows], color=COLOURS["predicted"], marker="o")
    right.axhline(1, color="grey", linewidth=1, linestyle="--")
    right.set(ylabel="error over that of copying (below 1 is better)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("seconds ahead" if in_seconds else "tubelets ahead")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Future features of {scores['videos']} videos", fontsize=11)
    save_figure(figure, path)
