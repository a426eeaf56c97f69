"""Scores of class probabilities and of predicted numbers.

Legend: N samples, C classes or targets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vjepa_fast.evaluation.labels import Labels


def topk_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of the samples whose class is among the k highest scores.

    Args:
        scores: [N, C]; NaN is below every number.
        labels: int64 [N].
    """
    return float(_hits(scores, labels, k).double().mean())


def mean_class_recall(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of hits among the k highest scores within each class, averaged over the classes that occur.

    Reference: evals/action_anticipation_frozen/metrics.py (Recall@5 of EPIC-KITCHENS).
    """
    hits = _hits(scores, labels, k).double()
    return float(torch.stack([hits[labels == one].mean() for one in labels.unique()]).mean())


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [C, C]: samples of class (row) taken for class (column)."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def r2_scores(predicted: Tensor, targets: Tensor) -> Tensor:
    """Coefficient of determination of each target, float64 [C]; 0 is as good as the mean of `targets`.

    Args:
        predicted, targets: [N, C].
    """
    error = (predicted.double() - targets.double()).square().mean(0)
    return 1 - error / targets.double().var(0, unbiased=False)


def classification_scores(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """top1, mean_class_accuracy and, where there are more than five classes, top5 and mean_class_recall_at_5."""
    found = {"top1": topk_accuracy(scores, labels, 1), "mean_class_accuracy": mean_class_recall(scores, labels, 1)}
    if scores.shape[1] > 5:
        found["top5"] = topk_accuracy(scores, labels, 5)
        found["mean_class_recall_at_5"] = mean_class_recall(scores, labels, 5)
    return found


def scores_of(labels: Labels, outputs: Tensor) -> dict[str, Any]:
    """Scores on the validation set of outputs [N, C]."""
    if labels.task == "classification":
        return classification_scores(outputs, labels.val.labels)
    each = r2_scores(outputs, labels.val.labels)
    error = (outputs.double() - labels.val.labels).abs().mean(0)
    return {
        "r2": float(each.mean()),
        "r2_by_target": dict(zip(labels.targets, each.tolist(), strict=True)),
        "mean_absolute_error": dict(zip(labels.targets, error.tolist(), strict=True)),
    }


def main_score(scores: dict[str, Any]) -> float:
    """The score that heads are compared by."""
    value = float(scores["top1"] if "top1" in scores else scores["r2"])
    return -math.inf if math.isnan(value) else value


def _hits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """bool [N]."""
    scores = torch.nan_to_num(scores.float(), nan=float("-inf"))
    return (scores.topk(min(k, scores.shape[1]), dim=1).indices == labels[:, None]).any(1)
