"""Steps whose loss is an outlier are left out."""

from __future__ import annotations

import numpy as np
import torch

from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.optim.outliers import LossOutliers


def make(factor: float = 2.0, size: int = 6) -> LossOutliers:
    cfg = OptimizationConfig(ipe=2, loss_reg_std_mult=factor, loss_reg_num_tracking_steps=size, loss_reg_min_epoch=3)
    return LossOutliers(cfg, torch.device("cpu"))


def test_as_the_reference_decides() -> None:
    """Its rule written with numpy: a list that grows at the end and is cut at the front."""
    outliers, trailing, found = make(), [], []
    losses = np.random.default_rng(0).normal(1.0, 0.1, 60)
    losses[[5, 20, 33, 34, 50]] += 1.0
    for step, loss in enumerate(losses):
        mean, std = (np.mean(trailing), np.std(trailing)) if trailing else (np.nan, np.nan)
        expected = loss > mean + 2.0 * std and step // 2 > 3 and len(trailing) > 3
        outliers.set_step(step)
        assert bool(outliers(torch.tensor(loss))) is bool(expected), step
        found += [step] if expected else []
        if not expected:
            trailing = (trailing + [loss])[-6:]
    assert {20, 33, 34, 50} <= set(found) and 5 not in found


def test_not_a_number_is_forgotten() -> None:
    outliers = make()
    for step, loss in enumerate([1.0, 1.1, float("nan"), 0.9, 1.0, 1.1, 0.9, 1.0]):
        outliers.set_step(step)
        assert not outliers(torch.tensor(loss))
    outliers.set_step(8)
    assert outliers(torch.tensor(5.0))


def test_state_goes_on() -> None:
    first, second = make(), make()
    for step, loss in enumerate([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.1, 0.9]):
        first.set_step(step)
        first(torch.tensor(loss))
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.set_step(9)
    assert first(torch.tensor(2.0)) and second(torch.tensor(2.0))
    make(size=4).load_state_dict(first.state_dict())
