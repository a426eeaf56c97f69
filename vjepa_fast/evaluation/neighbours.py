"""Classifies by k nearest neighbours on pooled features: no training, so only the features are measured.

Legend: N training and M test samples, D features, C classes or targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.evaluation.metrics import main_score, scores_of
from vjepa_fast.evaluation.probes import ProbeResult, ProbeSettings

if TYPE_CHECKING:
    from vjepa_fast.evaluation.run_probes import FrozenFeatures

NEIGHBOURS = (1, 5, 10, 20, 50)
"""Tried numbers of neighbours."""
TEMPERATURE = 0.07
"""Of the vote, as in Wu et al., arXiv 1805.01978, and DINO."""
_BLOCK = 1024


def nearest(x: Tensor, x_test: Tensor, k: int, excluded: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine similarity [M, k] and number [M, k] of the nearest training samples, nearest first.

    Features are standardised by the training set first, without which one direction that all share decides.

    Args:
        x: [N, D].
        x_test: [M, D].
        k: at most N.
        excluded: x_test is x, and no sample is its own neighbour; k is then at most N - 1.
    """
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-8)
    train, test = (F.normalize((one - mean) / scale, dim=1) for one in (x, x_test))
    found = []
    for start in range(0, len(test), _BLOCK):
        similarity = test[start : start + _BLOCK] @ train.T
        if excluded:
            own = torch.arange(len(similarity))
            similarity[own, own + start] = float("-inf")
        found.append(similarity.topk(k, dim=1))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def vote(similarity: Tensor, numbers: Tensor, targets: Tensor) -> Tensor:
    """[M, C]: the neighbours' targets, weighted by exp(similarity / TEMPERATURE).

    Args:
        similarity, numbers: [M, k] from `nearest`.
        targets: [N, C], one-hot for classes.
    """
    weights = torch.softmax(similarity.double() / TEMPERATURE, dim=1)
    return (weights[..., None] * targets.double()[numbers]).sum(1)


class NeighbourProbe:
    """`--probe knn`: the nearest training samples by the mean of the tokens, how many by leave-one-out.

    It has no randomness, and sees plain clips: with several versions of a video, one that is left out would still be
    there.
    """

    reads: Literal["means"] = "means"

    def fit(
        self,
        features: FrozenFeatures,
        settings: ProbeSettings,
        device: torch.device,
        report: Callable[[int, int, str], None],
    ) -> ProbeResult:
        """See Probe.fit."""
        labels, x, own = features.labels, features.train_means(), features.labels.train.labels
        targets = labels.as_numbers(own)
        tried = [k for k in NEIGHBOURS if k < len(x)]
        similarity, numbers = nearest(x, x, max(tried), excluded=True)
        inner = replace(labels, val=replace(labels.train, labels=own))
        quality = {k: main_score(scores_of(inner, vote(similarity[:, :k], numbers[:, :k], targets))) for k in tried}
        best = max(tried, key=lambda k: quality[k])
        views = features.val_means().unbind(1)
        outputs = torch.stack([vote(*nearest(x, view, best), targets) for view in views]).mean(0)
        details = {"neighbours": best, "leave_one_out_by_neighbours": quality}
        return ProbeResult(f"{best} nearest, mean features", scores_of(labels, outputs), outputs, details)
