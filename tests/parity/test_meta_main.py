"""Checkpoints exchanged with the reference's own training script, run whole in a process of its own."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vjepa_fast.checkpoints import meta_format
from vjepa_fast.train.step import TrainStep

from . import ours, reference_v2
from .cases import OPTIMIZATION, make_batch, relative_difference
from .meta_main import CASE

pytestmark = reference_v2.needs_reference

IPE, EPOCHS = OPTIMIZATION["ipe"], OPTIMIZATION["epochs"]


def run_reference(folder: Path) -> list[float]:
    """Train in `folder` to the last epoch; the loss of every step, with five decimals."""
    command = [sys.executable, "-m", "tests.parity.meta_main", str(folder)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)
    with (folder / "log_r0.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row["loss"]) for row in rows if row["loss"] != "loss"]


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("reference")
    return folder, run_reference(folder)


def networks(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    return {
        f"{part}.{key.removeprefix('module.backbone.')}": value
        for part in ours.PARTS
        for key, value in checkpoint[part].items()
    }


def our_training(checkpoint: Path) -> tuple[Any, TrainStep, dict[str, Any]]:
    model, cfg = ours.build(CASE)
    train_step = TrainStep(model, cfg)
    return model, train_step, meta_format.load_checkpoint(checkpoint, model, train_step.optimizer)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """fp32 weights after several steps of Adam, which enlarges rounding noise in gradients that are nearly zero.

    Biases consist of nothing but these steps; moments that are lost or belong to another parameter change them by
    several percent.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.any():
            assert relative_difference(found[name], value) <= 1e-3, name
        else:
            assert not found[name].any(), name


def test_theirs_resumes_here(reference_run: tuple[Path, list[float]]) -> None:
    folder, losses = reference_run
    assert len(losses) == IPE * EPOCHS
    model, train_step, info = our_training(folder / "e0.pt")
    assert info["epoch"] == 1
    for step in range(IPE, IPE * EPOCHS):
        found = ours.train(model, train_step, make_batch(CASE, step), step)
        assert found.loss == pytest.approx(losses[step], abs=6e-6)
    assert_close(ours.weights_of(model), networks(folder / f"e{EPOCHS - 1}.pt"))


def test_ours_resumes_there(reference_run: tuple[Path, list[float]], tmp_path: Path) -> None:
    """One epoch by the reference, one by us, the last by the reference again."""
    folder, losses = reference_run
    model, train_step, info = our_training(folder / "e0.pt")
    for step in range(IPE, 2 * IPE):
        ours.train(model, train_step, make_batch(CASE, step), step)
    meta_format.save_checkpoint(
        tmp_path / "latest.pt",
        model,
        train_step.optimizer,
        epoch=2,
        loss=info["loss"],
        batch_size=info["batch_size"],
        world_size=info["world_size"],
        lr=info["lr"],
    )
    shutil.copy(tmp_path / "latest.pt", tmp_path / "ours.pt")
    assert run_reference(tmp_path) == pytest.approx(losses[2 * IPE :], abs=1.1e-5)
    assert_close(networks(tmp_path / f"e{EPOCHS - 1}.pt"), networks(folder / f"e{EPOCHS - 1}.pt"))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(networks(tmp_path / "ours.pt").values(), networks(tmp_path / "latest.pt").values(), strict=True)
    ]
    assert sum(moved) > 0.8 * len(moved)
