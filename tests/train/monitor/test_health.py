"""The figures of health against their definitions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vjepa_fast.ops.latent_loss import target_features
from vjepa_fast.train.monitor import health
from vjepa_fast.train.monitor.health import Spread, effective_ranks, health_figures, read_figures
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]


def test_variance_comes_in_pieces() -> None:
    x = 100 + 1e-3 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    spread = Spread()
    for piece in x.split(64):
        spread.add(piece)
    # As a collapse is: little variance beside the mean.
    torch.testing.assert_close(spread.variance, x.double().var(0).float(), rtol=1e-3, atol=0)


def test_effective_ranks() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    ranks = effective_ranks([x, x[:, :1].expand(-1, 8), torch.ones(3, 8), x * math.nan])
    assert 7 < ranks[0] <= 8
    # A Gram matrix in fp32 knows singular values to half its digits.
    assert [float(rank) for rank in ranks[1:3]] == pytest.approx([1, 1], abs=0.01)
    assert math.isnan(ranks[3])


def test_effective_rank_of_wide_features() -> None:
    x = torch.randn(40, 2 * health.MAX_ROWS, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(x - x.mean(0))
    p = singular / singular.sum()
    wanted = torch.exp(-(p * p.clamp_min(1e-12).log()).sum())
    # Singular values by way of a Gram matrix in fp32.
    assert float(effective_ranks([x])[0]) == pytest.approx(float(wanted), rel=1e-2)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_figures_of_a_step(exponent: float, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces and by place, they are what the loss is made of."""
    monkeypatch.setattr(health, "_PIECE", 37)
    trainer = make(f"loss.loss_exp={exponent}")
    batch = next(iter(trainer.loader))
    result = trainer.run_step(batch)
    trainer.loader.close()
    output = result.output
    figures = read_figures(health_figures(output, trainer.model, exponent))
    targets, predictions = output.packed_targets, output.packed_predictions
    context = target_features(output.context, None, None)
    for name, x in (("target", targets), ("prediction", predictions), ("context", context)):
        assert figures[f"{name}_std"] == pytest.approx(float(x.std(0).mean()), rel=1e-4), name
    share = 1 - (predictions - targets).square().mean() / targets.var(0).mean()
    assert figures["explained"] == pytest.approx(float(share), rel=1e-3)
    # Masks of one length: the loss is the mean over masks.
    assert (figures["loss_mask0"] + figures["loss_mask1"]) / 2 == pytest.approx(float(result.loss), rel=1e-4)
    (masks,) = output.masks
    slots = masks.target_ids // (masks.grid[1] * masks.grid[2])
    losses = (predictions - targets).abs().pow(exponent).mean(1) / exponent
    for slot in range(masks.grid[0]):
        assert figures[f"loss_slot{slot}"] == pytest.approx(float(losses[slots == slot].mean()), rel=1e-4)
    assert 0 < figures["target_gap"] < 0.5
    assert -1 <= figures["clip_cosine"] <= 1
    assert float(result.part_norms.square().sum().sqrt()) == pytest.approx(float(result.grad_norm), rel=1e-5)


def test_cosine_between_clips(make: Make) -> None:
    trainer = make()
    batch = next(iter(trainer.loader))
    output = trainer.run_step(batch).output
    trainer.loader.close()
    tokens = output.masks[0].num_tokens
    targets = target_features(output.features, None, output.final_norm)
    pooled = targets.view(-1, tokens, targets.shape[1]).mean(1)
    unit = torch.nn.functional.normalize(pooled, dim=1)
    pairs = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    assert tokens <= health.CLIP_TOKENS
    figures = health_figures(output, trainer.model, 1.0)
    assert float(figures["clip_cosine"]) == pytest.approx(float(pairs.mean()), abs=1e-5)


def test_a_run_writes_them(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("train.max_steps=4").fit()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(
        math.isfinite(rows[0][key])
        for key in (
            "grad_norm_encoder",
            "grad_norm_predictor",
            "loss_mask1",
            "loss_slot0",
            "context_rank",
            "clip_cosine",
        )
    )
    said = capsys.readouterr().out
    assert "explained" in said and "predictions explain" in said
    assert not (tmp_path / "run" / "warnings.jsonl").exists()
