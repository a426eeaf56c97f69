"""Uses prediction error as a measure of surprise: are videos of impossible events predicted worse?

After Garrido et al., "Intuitive physics understanding emerges from self-supervised pretraining on natural videos"
(arXiv 2502.11831): a window slides over a video, its second half is predicted from its first, and the error is averaged
over tokens; a video's surprise is the mean over windows, or the highest. Nothing is fitted. The same with copied
features in place of predicted ones says how much of it is motion alone.

Legend: N videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError
from vjepa_fast.evaluation.report import save_figure
from vjepa_fast.inference.videos import Videos

MEASURED = ("predicted", "copied")
REDUCTIONS = ("mean window", "worst window", "worst token")
_RESAMPLED = 1000


def read_anomalies(name: str, videos: Videos) -> Tensor:
    """bool [N]: the videos with label 1.

    Args:
        name: of the manifest, for messages.
        videos: its content.

    Raises:
        UserError: labels other than 0 and 1, or only one of them.
    """
    for path, label in zip(videos.paths, videos.labels, strict=True):
        if label not in (0, 1):
            raise UserError(
                f"dataset {name!r}: the label of {path} is {label!r}; expected 0 (as it should be) or 1 "
                "(something impossible happens)"
            )
    labels = torch.tensor([bool(label) for label in videos.labels])
    if bool(labels.all()) or not bool(labels.any()):
        raise UserError(
            f"all {len(labels)} videos of {name!r} have label {int(labels[0])}; expected some with 0 (as "
            "it should be) and some with 1 (something impossible happens)"
        )
    return labels


def surprise(errors: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of one video, by what is measured and how it is put together.

    Args:
        errors: by kind [windows, F, S].
    """
    found = {}
    for kind in MEASURED:
        own = errors[kind].double()
        windows = own.mean((1, 2))
        values = float(windows.mean()), float(windows.max()), float(own.max())
        found[kind] = dict(zip(REDUCTIONS, values, strict=True))
    return found


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Probability that a video with label 1 scores above one without, ties counted half.

    Args:
        scores: [N].
        labels: bool [N], both values.
    """
    difference = scores[labels][:, None] - scores[~labels]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def interval(scores: Tensor, labels: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % of the areas under the curve of videos drawn anew, with replacement, within each label."""
    generator = torch.Generator().manual_seed(seed)
    ones, zeros = scores[labels], scores[~labels]
    which = torch.tensor([True] * len(ones) + [False] * len(zeros))
    areas = []
    for _ in range(_RESAMPLED):
        drawn = [own[torch.randint(len(own), (len(own),), generator=generator)] for own in (ones, zeros)]
        areas.append(area_under_curve(torch.cat(drawn), which))
    low, high = torch.tensor(areas).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def paired_accuracy(scores: Tensor, labels: Tensor) -> float | None:
    """Share of neighbouring videos 2k and 2k + 1, one of each label, of which that with label 1 scores higher; ties
    count half. None where there is no such pair.

    Args:
        scores: [N], in the order of the manifest.
        labels: bool [N].
    """
    count = len(scores) // 2 * 2
    pairs, kinds = scores[:count].view(-1, 2), labels[:count].view(-1, 2)
    mixed = kinds[:, 0] != kinds[:, 1]
    if not bool(mixed.any()):
        return None
    difference = torch.where(kinds[mixed, 1], pairs[mixed, 1] - pairs[mixed, 0], pairs[mixed, 0] - pairs[mixed, 1])
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def roc(scores: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """False and true positive rates as the threshold falls, from (0, 0) to (1, 1)."""
    false, true = [0.0], [0.0]
    for threshold in scores.unique().flip(0):
        above = scores >= threshold
        false.append(float(above[~labels].double().mean()))
        true.append(float(above[labels].double().mean()))
    return false, true


def surprise_scores(by_video: list[dict[str, dict[str, float]]], labels: Tensor, pairs: bool = False) -> dict[str, Any]:
    """Area under the ROC curve of every measure, with its 95 % interval.

    Args:
        by_video: from `surprise`.
        labels: bool [N].
        pairs: also paired_accuracy; by_video holds all videos of the manifest then.

    Raises:
        UserError: the videos that could be read have one label.
    """
    if not by_video or bool(labels.all()) or not bool(labels.any()):
        raise UserError("the videos that could be read all have one label; there is nothing to tell apart")
    found: dict[str, Any] = {"videos": len(labels), "anomalies": int(labels.sum()), "auc": {}}
    for kind in MEASURED:
        found["auc"][kind] = {}
        for how in REDUCTIONS:
            scores = torch.tensor([one[kind][how] for one in by_video], dtype=torch.float64)
            low, high = interval(scores, labels)
            found["auc"][kind][how] = {"auc": area_under_curve(scores, labels), "low": low, "high": high}
            if pairs:
                found["auc"][kind][how]["paired_accuracy"] = paired_accuracy(scores, labels)
    return found


def draw_surprise(
    path: Path, by_video: list[dict[str, dict[str, float]]], labels: Tensor, scores: dict[str, Any]
) -> None:
    """ROC curves, and the scores of both kinds of videos.

    Args:
        path: of the PNG.
        by_video, labels: as surprise_scores.
        scores: from it.
    """
    import numpy as np
    from matplotlib.figure import Figure

    how = "worst window"
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, colour in zip(MEASURED, ("tab:blue", "tab:orange"), strict=True):
        own = torch.tensor([one[kind][how] for one in by_video], dtype=torch.float64)
        auc = scores["auc"][kind][how]
        left.plot(
            *roc(own, labels), color=colour, label=f"{kind}: {auc['auc']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})"
        )
        if kind == "predicted":
            bins = np.linspace(float(own.min()), float(own.max()), 25).tolist()
            right.hist(own[~labels].numpy(), bins, alpha=0.6, color="tab:grey", label="as it should be (0)")
            right.hist(own[labels].numpy(), bins, alpha=0.6, color="tab:red", label="impossible (1)")
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    left.set(xlabel="share of ordinary videos above the threshold", ylabel="share of impossible ones", aspect="equal")
    left.legend(loc="lower right", title="area under the curve (95 %)", fontsize=9)
    right.set(xlabel="prediction error of the worst window", ylabel="videos")
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Surprise: {scores['anomalies']} of {scores['videos']} videos are impossible", fontsize=11)
    save_figure(figure, path)
