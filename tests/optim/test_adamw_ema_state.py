"""The state of AdamWEMA: not copied, and begun again where it was dropped."""

from __future__ import annotations

import copy

import pytest

from tests.optim.adamw_runs import assert_equal_runs, give_gradients, gradients_of_step, make_model
from vjepa_fast.optim.adamw_ema import AdamWEMA


def test_it_is_not_copied():
    with pytest.raises(TypeError, match="load.*state_dict"):
        copy.deepcopy(AdamWEMA(make_model()))


def test_moments_that_were_thrown_away_begin_anew():
    model, plain = make_model(), make_model()
    optimizer, oracle = AdamWEMA(model, lr=1e-3), AdamWEMA(plain, lr=1e-3)
    give_gradients(model, gradients_of_step(make_model(), 0))
    optimizer.step()
    optimizer.state.clear()
    model.load_state_dict(plain.state_dict())
    for step in range(2):
        for some, own in ((model, optimizer), (plain, oracle)):
            give_gradients(some, gradients_of_step(make_model(), step))
            own.step()
    assert_equal_runs(model, plain)
