"""The probes: ridge regression against a plain solver, the choice of the penalty, and what the scores mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vjepa_fast.evaluation.linear_probe import PENALTIES, Ridge, accuracy, r2


def noisy(num_samples: int, num_features: int, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and two targets that follow the first two features."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(num_samples, num_features, generator=generator)
    return x, x[:, :2] + 1 + noise * torch.randn(num_samples, 2, generator=generator)


def solve(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Ridge weights [D + 1, C] with an intercept that is not penalised, by the normal equations."""
    ones = torch.cat([x, x.new_ones(len(x), 1)], 1)
    ridge = penalty * torch.eye(ones.shape[1], dtype=x.dtype)
    ridge[-1, -1] = 0
    return torch.linalg.solve(ones.T @ ones + ridge, ones.T @ y)


@pytest.mark.parametrize("num_features", [8, 23, 24, 100])
def test_ridge_is_the_best_of_leave_one_out(num_features: int) -> None:
    """Fewer features than samples, as many, and more: the case of raw pixels."""
    x, y = noisy(24, num_features)
    ridge = Ridge.fit(x, y)
    z, target = (x.double() - ridge.mean) / ridge.scale, y.double()
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for out in range(len(x)):
            kept = torch.arange(len(x)) != out
            weight = solve(z[kept], target[kept], penalty)
            error += float((z[out] @ weight[:-1] + weight[-1] - target[out]).square().sum())
        errors.append(error)
    weight = solve(z, target, PENALTIES[errors.index(min(errors))])
    torch.testing.assert_close(ridge.weight, weight[:-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ridge(x), z @ weight[:-1] + weight[-1], rtol=1e-6, atol=1e-8)


def test_noise_with_many_features_scores_zero() -> None:
    """The penalty is seen to be needed although a weak one would fit the training set exactly."""
    x, x_test = noisy(60, 2000, seed=1)[0], noisy(400, 2000, seed=2)[0]
    y, y_test = noisy(60, 2, seed=3)[1], noisy(400, 2, seed=4)[1]
    assert -0.1 < r2(x, y, x_test, y_test) < 0.05


def test_r2_and_accuracy_of_known_relations() -> None:
    x, y = noisy(300, 5, noise=0.0)
    x_test, y_test = noisy(200, 5, noise=0.0, seed=1)
    assert r2(x, y, x_test, y_test) > 0.999
    # Half of the variance is noise.
    x, y = noisy(2000, 5, noise=2.0)
    x_test, y_test = noisy(2000, 5, noise=2.0, seed=1)
    assert r2(x, y, x_test, y_test) == pytest.approx(0.5, abs=0.05)
    labels, labels_test = (x[:, 0] > 3).long(), (x_test[:, 0] > 3).long()
    assert accuracy(x, labels, x_test, labels_test) > 0.95
    assert accuracy(x, labels, x_test, labels_test.flip(0)) == pytest.approx(0.5, abs=0.05)


def test_constant_features_do_no_harm() -> None:
    x, y = noisy(50, 4, noise=0.0)
    x_test, y_test = noisy(50, 4, noise=0.0, seed=1)
    flat, flat_test = torch.cat([x, torch.ones(50, 3)], 1), torch.cat([x_test, torch.ones(50, 3)], 1)
    assert r2(flat, y, flat_test, y_test) == pytest.approx(r2(x, y, x_test, y_test), abs=1e-6)
    assert r2(torch.ones(50, 3), y, torch.ones(50, 3), y_test) == pytest.approx(0, abs=0.2)
