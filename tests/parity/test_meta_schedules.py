"""The reference's schedules stepped through a whole run beside ours, which are functions of the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.optim.schedules import Schedules

from . import reference_v2

pytestmark = reference_v2.needs_reference

RUNS: dict[str, dict[str, Any]] = {
    "falling": {"lr": 1e-3, "final_lr": 1e-5, "weight_decay": 0.4, "final_weight_decay": 0.04, "warmup": 3},
    "rising": {"lr": 1e-4, "final_lr": 5e-4, "weight_decay": 0.04, "final_weight_decay": 0.4, "warmup": 3},
    "no_warmup": {"lr": 1e-3, "final_lr": 0.0, "weight_decay": 0.1, "final_weight_decay": 0.1, "warmup": 0},
    "fractional": {"lr": 1e-3, "final_lr": 1e-6, "warmup": 1.5, "ipe_scale": 1.13},
}


EPOCHS, IPE = 9, 7


def config(schedule: str, options: dict[str, Any]) -> OptimizationConfig:
    shared = {"epochs": EPOCHS, "ipe": IPE, "start_lr": 2e-4, "ema": (0.99, 1.0), "anneal": 2}
    return OptimizationConfig(**{"schedule": schedule, **shared, **options})


def learning_rates(cfg: OptimizationConfig) -> tuple[Any, torch.optim.Optimizer]:
    """The reference's learning rate schedule and the optimizer that it writes to."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedulers = reference_v2.modules().schedulers
    total = int(cfg.ipe_scale * EPOCHS * IPE)
    if cfg.schedule == "linear":
        return schedulers.LinearDecaySchedule(optimizer, ref_lr=cfg.lr, final_lr=cfg.final_lr, T_max=total), optimizer
    shared = {
        "warmup_steps": int(cfg.warmup * IPE),
        "start_lr": cfg.start_lr,
        "ref_lr": cfg.lr,
        "final_lr": cfg.final_lr,
        "T_max": total,
    }
    if cfg.schedule == "wsd":
        return schedulers.WSDSchedule(optimizer, anneal_steps=int(cfg.anneal * IPE), **shared), optimizer
    return schedulers.WarmupCosineSchedule(optimizer, **shared), optimizer


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("schedule", ["warmup_cosine", "linear", "wsd"])
def test_every_step(schedule: str, name: str) -> None:
    cfg = config(schedule, RUNS[name])
    lr_schedule, optimizer = learning_rates(cfg)
    wd_schedule = reference_v2.modules().schedulers.CosineWDSchedule(
        optimizer, ref_wd=cfg.weight_decay, final_wd=cfg.final_weight_decay, T_max=int(cfg.ipe_scale * EPOCHS * IPE)
    )
    ours = Schedules(cfg)
    for step in range(EPOCHS * IPE):
        lr_schedule.step()
        wd_schedule.step()
        group = optimizer.param_groups[0]
        assert ours.lr(step) == pytest.approx(group["lr"], rel=1e-12, abs=1e-18)
        assert ours.weight_decay(step) == pytest.approx(group["weight_decay"], rel=1e-12)
