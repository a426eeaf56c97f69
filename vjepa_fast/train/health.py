"""Is the model learning or collapsing: spread of targets and predictions.

Legend: K predicted tokens, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 1024


@torch.no_grad()
def feature_std(x: Tensor) -> float:
    """Standard deviation over tokens, averaged over the features of [K, D]; near 0 means collapse."""
    return float(x.float().std(dim=0).mean()) if len(x) > 1 else 0.0


@torch.no_grad()
def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred [K, D].

    Between 1 (all features move together) and min(K, D). At most MAX_ROWS evenly spaced tokens are used. Roy and
    Vetterli, "The effective rank", EUSIPCO 2007.
    """
    x = x[:: max(1, len(x) // MAX_ROWS)].float()
    if not torch.isfinite(x).all():
        return float("nan")
    x = x - x.mean(dim=0)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T)
    singular = eigenvalues.clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return 1.0
    p = singular / total
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def health_figures(targets: Tensor, predictions: Tensor) -> dict[str, float]:
    """target_std, target_rank, prediction_std and prediction_rank of [K, D] features."""
    pairs = (("target", targets), ("prediction", predictions))
    spread = {f"{name}_std": feature_std(x) for name, x in pairs}
    return spread | {f"{name}_rank": effective_rank(x) for name, x in pairs}
