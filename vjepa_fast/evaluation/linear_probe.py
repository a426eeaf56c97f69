"""Ridge regression and classification on frozen features, with the penalty chosen on the training set alone.

Legend: N train and M test samples, D features, C targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10.0**exponent for exponent in range(-4, 7))
"""Tried penalties; features are standardised first."""


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> Ridge:
        """Fit in float64 with the penalty of the least leave-one-out error, one for all targets.

        The leave-one-out residual is r_i / (1 - H_ii), with the hat matrix from one eigendecomposition
        (Golub, Heath and Wahba, Technometrics 1979).

        Args:
            x: [N, D].
            y: [N, C].
        """
        x, y = x.double(), y.double()
        mean, scale = x.mean(0), x.std(0).clamp_min(1e-8)
        bias = y.mean(0)
        x, y = (x - mean) / scale, y - bias
        # Eigenvectors of the smaller of the two Gram matrices: raw pixels have many more features than samples.
        wide = x.shape[1] > len(x)
        energy, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
        known = energy > 1e-12 * energy[-1]
        energy = energy[known]
        u = vectors[:, known] if wide else x @ vectors[:, known] / energy.sqrt()
        uy = u.T @ y
        outside = y - u @ uy
        # The mean is fitted too: it takes 1 / N of every sample.
        beyond = 1 - 1.0 / len(x) - u.square().sum(1)
        best: tuple[float, Tensor] | None = None
        for penalty in PENALTIES:
            # Residual and 1 - leverage are summed from small terms: 1 - (nearly 1) would lose them where there are more
            # features than samples and hardly any penalty.
            kept = penalty / (energy + penalty)
            free = beyond.clamp_min(0) + u.square() @ kept
            error = float((((outside + u @ (kept[:, None] * uy)) / free[:, None]) ** 2).mean())
            if best is None or error < best[0]:
                best = (error, x.T @ (u @ ((kept / penalty)[:, None] * uy)))
        assert best is not None
        return cls(mean, scale, best[1], bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [M, C] for [M, D]."""
        return (x.double() - self.mean) / self.scale @ self.weight + self.bias


def r2(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Coefficient of determination on the test set, averaged over targets; 0 is as good as the test mean.

    Args:
        x, x_test: [N, D] and [M, D] features.
        y, y_test: [N, C] and [M, C].
    """
    error = (Ridge.fit(x, y)(x_test) - y_test.double()).square().mean(0)
    return float((1 - error / y_test.double().var(0, unbiased=False)).mean())


def accuracy(x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor) -> float:
    """Top-1 accuracy of ridge regression to one-hot targets.

    Args:
        labels, labels_test: int64 [N] and [M] class numbers.
    """
    one_hot = torch.nn.functional.one_hot(labels, int(labels.max()) + 1)
    return float((Ridge.fit(x, one_hot)(x_test).argmax(1) == labels_test).double().mean())
