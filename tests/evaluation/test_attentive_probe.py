"""A grid of heads: the same as its heads one by one, torch's AdamW, and schedules at their ends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.evaluation.attentive_probe import GridAdamW, HeadSetting, loss_of, predict, train_grid
from vjepa_fast.evaluation.head_grid import HeadGrid
from vjepa_fast.models.attentive import AttentiveClassifier

DIM, HEADS, CLASSES, SAMPLES, EPOCHS, BATCH = 24, 3, 4, 10, 3, 4
SETTINGS = [
    HeadSetting(5e-3, 0.01),
    HeadSetting(1e-3, 0.8, warmup=1.0, start_lr=0.0),
    HeadSetting(3e-4, 0.1, final_weight_decay=0.4),
]


def features(seed: int = 0) -> Tensor:
    return torch.randn(SAMPLES, 7, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "classes":
        return torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return torch.randn(SAMPLES, CLASSES, dtype=torch.float64, generator=generator)


def start(depth: int, count: int = 3) -> list[dict[str, Tensor]]:
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        probe = AttentiveClassifier(DIM, HEADS, CLASSES, depth).double()
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        states.append(probe.state_dict())
    return states


def trained(
    states: list[dict[str, Tensor]],
    settings: list[HeadSetting],
    kind: str,
    clip: float | None,
    decay_all: bool,
    together: int | None = None,
) -> HeadGrid:
    grid = HeadGrid(states, HEADS)
    x = features()
    train_grid(
        grid,
        settings,
        lambda epoch, numbers: x[numbers] + epoch,
        labels(kind),
        EPOCHS,
        BATCH,
        0,
        GridAdamW(grid, decay_all, clip),
        lambda epoch, losses: None,
        together,
    )
    return grid


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("kind", "clip", "decay_all"), [("classes", None, True), ("numbers", 0.5, False)])
def test_heads_together_are_heads_one_by_one(depth: int, kind: str, clip: float | None, decay_all: bool) -> None:
    states = start(depth)
    together = trained(states, SETTINGS, kind, clip, decay_all)
    for head, (state, setting) in enumerate(zip(states, SETTINGS, strict=True)):
        alone = trained([state], [setting], kind, clip, decay_all).state_dict(0)
        for name, value in together.state_dict(head).items():
            assert not torch.equal(value, state[name]) or name.endswith("bias"), name
            assert (value - alone[name]).norm() <= 1e-12 * alone[name].norm(), name


def test_samples_in_parts_are_samples_together() -> None:
    states = start(3)
    whole, parts = (trained(states, SETTINGS, "classes", 0.5, True, together) for together in (None, 3))
    for name, value in whole.parameters.items():
        assert (value - parts.parameters[name]).norm() <= 1e-12 * value.norm(), name
    assert HeadGrid.start(20, 24, 3, 4, 4, 0).samples_together(2**30, torch.device("cpu")) == 1


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_head_is_the_module_under_torchs_adamw(depth: int, clip: float | None) -> None:
    """The grid never makes keys and values; the module does."""
    states = start(depth)
    grid = HeadGrid(states, HEADS)
    optimizer = GridAdamW(grid, clip_norm=clip)
    probe = AttentiveClassifier(DIM, HEADS, CLASSES, depth).double()
    probe.load_state_dict(states[1])
    theirs = torch.optim.AdamW(probe.parameters())
    x, y = features(), labels("classes")
    rates, decays = torch.tensor([[1.0, 2e-3, 1e-3], [0.5, 0.3, 0.1]], dtype=torch.float64)
    for _ in range(3):
        outputs = grid(x)
        loss_of(outputs, y).sum().backward()
        expected = probe(x)
        assert (outputs[1] - expected).norm() <= 1e-12 * expected.norm()
        F.cross_entropy(expected, y).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(probe.parameters(), clip)
        theirs.param_groups[0].update(lr=2e-3, weight_decay=0.3)
        optimizer.step(rates, decays)
        theirs.step()
        theirs.zero_grad()
    for name, value in grid.state_dict(1).items():
        expected = probe.state_dict()[name]
        # The bias of the keys gets rounding noise there, which Adam makes whole steps of.
        if name.endswith("xattn.kv.bias"):
            value, expected = value[DIM:], expected[DIM:]
        elif name.endswith("qkv.bias"):
            value, expected = (torch.cat([one[:DIM], one[2 * DIM :]]) for one in (value, expected))
        assert (value - expected).norm() <= 1e-9 * expected.norm(), name


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    states = start(1)
    settings = [HeadSetting(1e200, 0.0), *SETTINGS[1:]]
    grid = trained(states, settings, "classes", None, True)
    assert not all(bool(value.isfinite().all()) for value in grid.state_dict(0).values())
    expected = trained(states[1:], settings[1:], "classes", None, True)
    for name, value in grid.state_dict(1).items():
        other = expected.state_dict(0)[name]
        assert (value - other).norm() <= 1e-12 * other.norm(), name


def test_probabilities_are_averaged_over_views() -> None:
    grid = HeadGrid(start(1, 2), HEADS)
    views = torch.stack([features(0), features(1)], 1)
    found = predict(grid, lambda numbers: views[list(numbers)], SAMPLES, 3, probabilities=True)
    with torch.no_grad():
        expected = (grid(views[:, 0]).softmax(-1) + grid(views[:, 1]).softmax(-1)) / 2
    assert torch.allclose(found, expected, atol=1e-12)


def test_bf16_is_near() -> None:
    grid = HeadGrid([{name: value.float() for name, value in state.items()} for state in start(4, 2)], HEADS)
    with torch.no_grad():
        exact, rounded = grid(features().float()), grid(features().bfloat16())
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.03


def test_schedules_begin_and_end_where_they_should() -> None:
    one = HeadSetting(1e-3, 0.1, start_lr=1e-4, final_lr=1e-6, final_weight_decay=0.4, warmup=2)
    assert one.at(1, 100, 10)[0] == pytest.approx(1e-4 + (1e-3 - 1e-4) / 20)
    assert one.at(20, 100, 10)[0] == pytest.approx(1e-3)
    assert one.at(100, 100, 10) == pytest.approx((1e-6, 0.4))
