"""Launches and bytes of a step: ours does with far fewer than the reference, and the page says how many."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.count_step import as_markdown, compare
from vjepa_fast.bench.steps import OurStep
from vjepa_fast.bench.timing import environment
from vjepa_fast.bench.workload import TRIAL
from vjepa_fast.cost.counter import LaunchCounter, count_step
from vjepa_fast.train.step import TrainStep

CPU = torch.device("cpu")


def test_fake_step_dispatches_what_a_true_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    step = OurStep(TRIAL, CPU, 1)
    step(0)
    with LaunchCounter() as counter:
        step(0)
    fake = count_step(TRIAL.config, [TRIAL.masks(CPU)], kernels=False, make_step=TrainStep)
    assert set(fake) == set(counter.tallies)
    for part in fake:
        # The layout of packed tokens is worked out on the host and not counted on fake tensors.
        slack = 30 if part == "predictor" else 4
        assert abs(counter.tallies[part].launches - fake[part].launches) <= slack, part
        assert fake[part].num_bytes == pytest.approx(counter.tallies[part].num_bytes, rel=0.02, abs=4096), part


def test_beside_the_reference() -> None:
    root = os.environ.get("VJEPA2_REFERENCE")
    model = TRIAL.config.model.model_copy(update={"depth": 2})
    shallow = replace(TRIAL, given=TRIAL.config.model_copy(update={"model": model}))
    found = compare(shallow, Path(root) if root else None)
    sides = found["sides"]
    assert sides["ours, kernels"]["launches"] < sides["ours, plain PyTorch"]["launches"]
    assert sides["ours, kernels"]["gigabytes"] < sides["ours, plain PyTorch"]["gigabytes"]
    page = as_markdown({"environment": environment(CPU), "configs": [found]})
    assert f"| ours, kernels | {sides['ours, kernels']['launches']} |" in page and "| optimizer |" in page
    if root:
        again, once = sides["reference as configured"], sides["reference, no checkpointing"]
        assert again["launches"] > once["launches"] > 5 * sides["ours, kernels"]["launches"]
