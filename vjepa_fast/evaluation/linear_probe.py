"""Ridge regression and classification on frozen features, with the penalty chosen on the training set alone.

Legend: N train and M test samples, D features, C targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vjepa_fast.evaluation.metrics import scores_of
from vjepa_fast.evaluation.probes import ProbeResult, ProbeSettings

if TYPE_CHECKING:
    from vjepa_fast.evaluation.run_probes import FrozenFeatures

PENALTIES = tuple(10.0**exponent for exponent in range(-4, 7))
"""Tried penalties; features are standardised first."""


@dataclass(frozen=True)
class Decomposition:
    """Training features, decomposed once for ridge regressions to any number of targets."""

    x: Tensor
    """float64 [N, D], standardised by:"""
    mean: Tensor
    scale: Tensor
    energy: Tensor
    """[R], eigenvalues of x x^T that are not 0, ascending."""
    u: Tensor
    """[N, R], their eigenvectors."""

    @classmethod
    def of(cls, x: Tensor) -> Decomposition:
        """Of features [N, D]."""
        x = x.double()
        mean, scale = x.mean(0), x.std(0).clamp_min(1e-8)
        x = (x - mean) / scale
        # Eigenvectors of the smaller of the two Gram matrices: raw pixels have many more features than samples.
        wide = x.shape[1] > len(x)
        energy, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
        known = energy > 1e-12 * energy[-1]
        energy = energy[known]
        return cls(x, mean, scale, energy, vectors[:, known] if wide else x @ vectors[:, known] / energy.sqrt())

    def fit(self, y: Tensor) -> Ridge:
        """Fit in float64 with the penalty of the least leave-one-out error, one for all targets.

        The leave-one-out residual is r_i / (1 - H_ii), with the hat matrix from one eigendecomposition
        (Golub, Heath and Wahba, Technometrics 1979).

        Args:
            y: [N, C].
        """
        y = y.double()
        bias = y.mean(0)
        y = y - bias
        u, energy = self.u, self.energy
        uy = u.T @ y
        outside = y - u @ uy
        # The mean is fitted too: it takes 1 / N of every sample.
        beyond = 1 - 1.0 / len(u) - u.square().sum(1)
        best: tuple[float, Tensor] | None = None
        for penalty in PENALTIES:
            # Residual and 1 - leverage are summed from small terms: 1 - (nearly 1) would lose them where there are more
            # features than samples and hardly any penalty.
            kept = penalty / (energy + penalty)
            free = beyond.clamp_min(0) + u.square() @ kept
            error = float((((outside + u @ (kept[:, None] * uy)) / free[:, None]) ** 2).mean())
            if best is None or error < best[0]:
                best = (error, kept / penalty)
        assert best is not None
        return Ridge(self.mean, self.scale, self.x.T @ (u @ (best[1][:, None] * uy)), bias)


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> Ridge:
        """As Decomposition.fit, for one set of targets.

        Args:
            x: [N, D].
            y: [N, C].
        """
        return Decomposition.of(x).fit(y)

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [M, C] for [M, D]."""
        return (x.double() - self.mean) / self.scale @ self.weight + self.bias

    def r2(self, x: Tensor, y: Tensor) -> float:
        """Coefficient of determination, averaged over targets; 0 is as good as the mean of y.

        Args:
            x: [M, D] features.
            y: [M, C].
        """
        error = (self(x) - y.double()).square().mean(0)
        return float((1 - error / y.double().var(0, unbiased=False)).mean())


def r2(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Ridge.r2 on the test set, fitted on the other.

    Args:
        x, x_test: [N, D] and [M, D] features.
        y, y_test: [N, C] and [M, C].
    """
    return Ridge.fit(x, y).r2(x_test, y_test)


def accuracy(x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor) -> float:
    """Top-1 accuracy of ridge regression to one-hot targets.

    Args:
        labels, labels_test: int64 [N] and [M] class numbers.
    """
    one_hot = torch.nn.functional.one_hot(labels, int(labels.max()) + 1)
    return float((Ridge.fit(x, one_hot)(x_test).argmax(1) == labels_test).double().mean())


class LinearProbe:
    """`--probe linear`: ridge regression on the mean of the tokens, the penalty by leave-one-out on the training set.

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
        labels = features.labels
        ridge = Ridge.fit(features.train_means(), labels.as_numbers(labels.train.labels))
        outputs = torch.stack([ridge(view) for view in features.val_means().unbind(1)]).mean(0)
        return ProbeResult("linear, mean features", scores_of(labels, outputs), outputs)
