"""The optimizer's work shared by two processes: the same training, half of the moments, the same checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers import forked
from tests.helpers.comparing import column, far
from tests.helpers.tiny import tiny_config
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import Batch
from vjepa_fast.train.step import StepResult
from vjepa_fast.train.trainer import Trainer

STEPS = 8


def configs(csv_path: Path, cache: Path) -> dict[str, Config]:
    base = ("optimization.clip_grad=0.05", f"train.max_steps={STEPS}", f"train.checkpoint_every={STEPS}")
    changes = {
        "ddp": (),
        "zero": ("train.shard_optimizer=true",),
        "ddp_bfloat16": ("train.dtype=bfloat16",),
        "zero_bfloat16": ("train.shard_optimizer=true", "train.dtype=bfloat16"),
    }
    return {name: tiny_config(csv_path, cache, *base, *some) for name, some in changes.items()}


def train_all(rank: int, cfgs: dict[str, Config], folder: Path) -> int:
    for name, cfg in cfgs.items():
        (folder / name).mkdir(exist_ok=True)
        trainer = Trainer(cfg, folder=folder / name)
        last = remember_last(trainer)
        trainer.fit()
        optimizer = trainer.task.train_step.optimizer
        kept = sum(value.numel() for state in optimizer.state.values() for value in state.values())
        (folder / name / f"kept_r{rank}").write_text(str(kept))
        networks = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        torch.save(networks, folder / name / f"model_r{rank}.pt")
        # Weights that are out of date when a run goes back.
        trainer.run_step(last[0])
        trainer.checkpoints.roll_back()
        torch.save(trainer.model.state_dict(), folder / name / f"back_r{rank}.pt")
    # A checkpoint of shares goes on as one of whole states, and the other way round.
    for name, of in (("zero", "ddp"), ("ddp", "zero")):
        go_on(cfgs[name], folder / of / "latest.pt", folder / f"{of}_then_{name}")
    return 0


def remember_last(trainer: Trainer) -> list[Batch]:
    last: list[Batch] = []
    original = trainer.run_step

    def run_step(batch: Batch) -> StepResult:
        last[:] = [batch]
        return original(batch)

    trainer.run_step = run_step  # type: ignore[method-assign]
    return last


def go_on(cfg: Config, checkpoint: Path, out: Path) -> None:
    cfg = cfg.model_copy(deep=True)
    cfg.train.max_steps, cfg.train.read_checkpoint = STEPS + 3, checkpoint
    out.mkdir(exist_ok=True)
    Trainer(cfg, folder=out).fit()


@pytest.fixture(scope="module")
def folder(video_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    cfgs = configs(video_csv, folder / "cache")
    assert forked.launch(partial(train_all, cfgs=cfgs, folder=folder), 2) == 0
    # One process goes on from shares too.
    go_on(cfgs["zero"], folder / "zero" / "latest.pt", folder / "zero_then_one")
    return folder


@pytest.mark.parametrize("dtype", ["", "_bfloat16"])
def test_same_training(dtype: str, folder: Path) -> None:
    zero, ddp = folder / f"zero{dtype}", folder / f"ddp{dtype}"
    differences = [abs(x - y) for x, y in zip(column(zero / "log_r0.csv"), column(ddp / "log_r0.csv"), strict=True)]
    assert len(differences) == STEPS and max(differences) <= 1e-6
    shares = [torch.load(zero / f"model_r{rank}.pt") for rank in range(2)]
    assert all(torch.equal(shares[0][key], shares[1][key]) for key in shares[0])
    assert far(shares[0], torch.load(ddp / "model_r0.pt")) <= 1e-6


@pytest.mark.parametrize("dtype", ["", "_bfloat16"])
@pytest.mark.parametrize("rank", [0, 1])
def test_goes_back(rank: int, dtype: str, folder: Path) -> None:
    there, back = (torch.load(folder / f"zero{dtype}" / f"{name}_r{rank}.pt") for name in ("model", "back"))
    assert all(torch.equal(there[key], back[key]) for key in there)


def test_each_process_keeps_its_share(folder: Path) -> None:
    whole = int((folder / "ddp" / "kept_r0").read_text())
    shares = [int((folder / "zero" / f"kept_r{rank}").read_text()) for rank in range(2)]
    # A parameter in two shares has two step counts.
    assert whole <= sum(shares) <= whole + 40
    assert max(shares) < 0.6 * whole


def test_same_checkpoints(folder: Path) -> None:
    zero, ddp = (torch.load(folder / name / "latest.pt", weights_only=True)["opt"] for name in ("zero", "ddp"))
    assert list(zero["state"]) == list(ddp["state"])
    for number, state in ddp["state"].items():
        assert far(zero["state"][number], state) <= 1e-5
    assert zero["param_groups"] == ddp["param_groups"]


def test_goes_on_with_and_without(folder: Path) -> None:
    first, *others = (
        torch.load(folder / name / "latest.pt", weights_only=True)["encoder"]
        for name in ("zero_then_ddp", "ddp_then_zero", "zero_then_one")
    )
    for other in others:
        assert far(first, other) <= 1e-6
