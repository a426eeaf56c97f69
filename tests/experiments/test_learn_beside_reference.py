"""Figures of the runs beside the reference."""

from __future__ import annotations

import numpy as np

from experiments.learn_beside_reference import curves, outside


def runs(ours: list[list[float]], theirs: list[list[float]]) -> list[dict[str, object]]:
    return [{"losses": {"ours": one, "reference": other}} for one, other in zip(ours, theirs, strict=True)]


def test_curves_are_means_of_the_last_ten_steps() -> None:
    losses = [float(step) for step in range(12)]
    found = curves(runs([losses], [losses]), "ours")
    assert found.shape == (1, 12) and np.allclose(found[0, [0, 1, 9, 11]], [0, 0.5, 4.5, 6.5])


def test_outside_counts_steps_beyond_what_seeds_differ_by() -> None:
    # Deviation of the seeds: 1.41 on either side, 2 of both together. Steps 2 and 3 are 3 apart, with means over the
    # steps so far 0, 0, 1 and 1.5; then 30 apart.
    ours = [[0.0, 0.0, 3.0, 3.0, 30.0], [2.0, 2.0, 5.0, 5.0, 32.0]]
    theirs = [[0.0] * 5, [2.0] * 5]
    assert outside(runs(ours, theirs)) == 1 / 5
    assert outside(runs(theirs, theirs)) == 0
