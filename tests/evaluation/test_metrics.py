"""Scores by hand."""

from __future__ import annotations

import pytest
import torch

from vjepa_fast.evaluation.metrics import classification_scores, confusion, mean_class_recall, r2_scores, topk_accuracy
from vjepa_fast.evaluation.neighbours import nearest, vote

SCORES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.5, 0.1], [float("nan"), 0.2, 0.8]])
LABELS = torch.tensor([0, 1, 0, 0])


def test_top_k() -> None:
    assert topk_accuracy(SCORES, LABELS, 1) == 0.25
    assert topk_accuracy(SCORES, LABELS, 2) == 0.75
    assert topk_accuracy(SCORES, LABELS, 9) == 1.0


def test_mean_class_recall_counts_classes_alike() -> None:
    # Class 0: one of three, class 1: none; class 2 does not occur.
    assert mean_class_recall(SCORES, LABELS, 1) == pytest.approx((1 / 3 + 0) / 2)
    assert mean_class_recall(SCORES, LABELS, 2) == pytest.approx((2 / 3 + 1) / 2)


def test_which_scores_there_are() -> None:
    assert set(classification_scores(SCORES, LABELS)) == {"top1", "mean_class_accuracy"}
    many = classification_scores(torch.eye(7), torch.tensor([0, 1, 2, 3, 4, 5, 0]))
    assert many["top1"] == pytest.approx(6 / 7) and many["top5"] == pytest.approx(6 / 7, abs=1 / 6)
    assert "mean_class_recall_at_5" in many


def test_confusion() -> None:
    found = confusion(torch.tensor([0, 2, 1, 2]), LABELS, 3)
    assert found.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_r2() -> None:
    targets = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    found = r2_scores(torch.tensor([[0.0, 2.0], [2.0, 2.0]]), targets)
    assert found.tolist() == pytest.approx([1.0, 0.0])


def test_neighbours() -> None:
    x = torch.tensor([[1.0, 0.1], [1.1, 0.0], [-1.0, 0.0], [-1.1, -0.1]])
    similarity, numbers = nearest(x, x, 1, excluded=True)
    assert numbers[:, 0].tolist() == [1, 0, 3, 2]
    assert nearest(x, x, 1)[1][:, 0].tolist() == [0, 1, 2, 3]
    targets = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    assert vote(similarity, numbers, targets)[:, 0].tolist() == [1.0, 0.0, 3.0, 2.0]
    # The nearer one counts more.
    near, far = vote(torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 3]]), targets)[0].item(), 3.0
    assert 0 < near < far / 2
