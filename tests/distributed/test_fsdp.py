"""Sharded parameters (FSDP2) on two processes: the training of data parallelism, half of the memory, and its files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import forked
from tests.helpers.comparing import column, far
from tests.helpers.tiny import tiny_config
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import Batch
from vjepa_fast.distributed.parallel import whole_copy
from vjepa_fast.optim.dtensors import local_of
from vjepa_fast.train.step import StepResult
from vjepa_fast.train.trainer import Trainer

STEPS = 8
BASE = (
    "optimization.clip_grad=0.05",
    f"train.max_steps={STEPS}",
    f"train.checkpoint_every={STEPS}",
    "train.checkpoint_format=meta",
)
BFLOAT16_STEPS = 4
BFLOAT16 = (
    f"train.max_steps={BFLOAT16_STEPS}",
    "train.dtype=bfloat16",
    "model.activation_checkpointing=selective",
    "model.drop_path_rate=0.2",
)


def configs(csv_path: Path, cache: Path) -> dict[str, Config]:
    return {
        f"{parallel}{kind}": tiny_config(csv_path, cache, *BASE, f"train.parallel={parallel}", *changes)
        for parallel in ("ddp", "fsdp")
        for kind, changes in (("", ()), ("_bfloat16", BFLOAT16))
    }


class Recording(Trainer):
    """Keeps the clips' numbers and the masks of each step."""

    def fit_recorded(self) -> list[Any]:
        self.seen: list[Any] = []
        self.fit()
        return self.seen

    def run_step(self, batch: Batch) -> StepResult:
        masks = self.task.masks_of(batch)
        self.seen.append([*batch.sample_ids, *(ids for m in masks for ids in (m.context_ids, m.target_ids))])
        return super().run_step(batch)


def train_all(rank: int, cfgs: dict[str, Config], folder: Path) -> int:
    for name, cfg in cfgs.items():
        (folder / name).mkdir(exist_ok=True)
        trainer = Recording(cfg, folder=folder / name)
        torch.save(trainer.fit_recorded(), folder / name / f"seen_r{rank}.pt")
        state = trainer.task.train_step.optimizer.state.values()
        kept = [
            sum(local_of(p).numel() for p in trainer.model.parameters()),
            sum(local_of(value).numel() for values in state for value in values.values() if value.ndim),
        ]
        torch.save(kept, folder / name / f"kept_r{rank}.pt")
        # What a probe at the end of a run sees.
        if cfg.train.parallel == "fsdp":
            whole = whole_copy(trainer.model)
            assert (whole is None) == (rank > 0)
            if whole is not None:
                torch.save(whole.state_dict(), folder / name / "whole.pt")
    for name, of in (("fsdp", "ddp"), ("ddp", "fsdp")):
        cfg = cfgs[name].model_copy(deep=True)
        cfg.train.max_steps, cfg.train.read_checkpoint = STEPS + 2, folder / of / "latest.pt"
        out = folder / f"{of}_then_{name}"
        out.mkdir(exist_ok=True)
        Trainer(cfg, folder=out).fit()
    spoil(rank, cfgs["fsdp"], folder)
    return 0


def spoil(rank: int, cfg: Config, folder: Path) -> None:
    """A gradient in one process's shard is not a number: no process takes the step."""
    cfg = cfg.model_copy(deep=True)
    cfg.train.max_steps = 1
    out = folder / "spoilt"
    out.mkdir(exist_ok=True)
    trainer = Trainer(cfg, folder=out)

    def spoil_gradient(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if rank == 1:
            local_of(trainer.model.encoder.patch_embed.proj.weight.grad).view(-1)[0] = torch.nan

    trainer.task.train_step.optimizer.register_step_pre_hook(spoil_gradient)
    before = {key: local_of(value).clone() for key, value in trainer.model.state_dict().items()}
    trainer.fit()
    after = {key: local_of(value) for key, value in trainer.model.state_dict().items()}
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    torch.save([changed, float(trainer.task.train_step.optimizer.skipped)], out / f"changed_r{rank}.pt")


@pytest.fixture(scope="module")
def folder(video_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    assert forked.launch(partial(train_all, cfgs=configs(video_csv, folder / "cache"), folder=folder), 2) == 0
    return folder


def networks(path: Path) -> dict[str, torch.Tensor]:
    contents = torch.load(path, weights_only=True)
    return {
        f"{network}.{key}": value
        for network in ("encoder", "predictor", "target_encoder")
        for key, value in contents[network].items()
    }


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over norm, of all tensors together."""
    assert a.keys() == b.keys()
    one, other = (torch.cat([x[key].double().flatten() for key in a]) for x in (a, b))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("dtype, steps", [("", STEPS), ("_bfloat16", BFLOAT16_STEPS)])
def test_same_training(dtype: str, steps: int, folder: Path) -> None:
    fsdp, ddp = folder / f"fsdp{dtype}", folder / f"ddp{dtype}"
    pairs = list(zip(column(fsdp / "log_r0.csv"), column(ddp / "log_r0.csv"), strict=True))
    assert len(pairs) == steps and max(abs(x - y) / y for x, y in pairs) <= 1e-6
    assert distance(networks(fsdp / "latest.pt"), networks(ddp / "latest.pt")) <= 1e-6
    # Of a bias without influence (that of the keys) the gradient is rounding, which Adam makes as large as any other.
    assert far(networks(fsdp / "latest.pt"), networks(ddp / "latest.pt")) <= 1e-5


def test_same_clips_and_masks(folder: Path) -> None:
    for rank in range(2):
        fsdp, ddp = (torch.load(folder / name / f"seen_r{rank}.pt") for name in ("fsdp", "ddp"))
        assert len(fsdp) == STEPS
        for a, b in zip(fsdp, ddp, strict=True):
            assert len(a) == len(b) and all(map(torch.equal, a, b))


def test_each_process_keeps_half(folder: Path) -> None:
    whole = torch.load(folder / "ddp" / "kept_r0.pt")
    shares = [torch.load(folder / "fsdp" / f"kept_r{rank}.pt") for rank in range(2)]
    for number in range(2):
        assert sum(share[number] for share in shares) == whole[number]
        assert max(share[number] for share in shares) < 0.6 * whole[number]


def test_same_checkpoints(folder: Path) -> None:
    fsdp, ddp = (torch.load(folder / name / "latest.pt", weights_only=True) for name in ("fsdp", "ddp"))
    assert list(fsdp) == list(ddp) and fsdp["opt"]["param_groups"] == ddp["opt"]["param_groups"]
    assert list(fsdp["opt"]["state"]) == list(ddp["opt"]["state"])
    for number, state in ddp["opt"]["state"].items():
        assert far(fsdp["opt"]["state"][number], state) <= 1e-4
    whole = torch.load(folder / "fsdp" / "whole.pt")
    for key, value in fsdp["target_encoder"].items():
        assert torch.equal(whole[f"target_encoder.{key.removeprefix('module.backbone.')}"], value)


def test_goes_on_with_and_without(folder: Path) -> None:
    one, other = (networks(folder / name / "latest.pt") for name in ("ddp_then_fsdp", "fsdp_then_ddp"))
    assert distance(one, other) <= 1e-6
    assert distance(one, networks(folder / "ddp" / "latest.pt")) > 1e-4


def test_no_process_takes_a_step_that_is_bad_in_one(folder: Path) -> None:
    for rank in range(2):
        changed, skipped = torch.load(folder / "spoilt" / f"changed_r{rank}.pt")
        assert changed == [] and skipped == 1.0


@pytest.mark.parametrize(
    "changes, words",
    [
        (("train.shard_optimizer=true",), "train.shard_optimizer is set"),
        (("train.dtype=float16",), "train.dtype is float16"),
        (("model.target_precision=float8",), "model.target_precision is float8"),
        (("data.datasets=[a, b]", "data.dataset_fpcs=[4, 8]"), "clips of [4, 8] frames"),
    ],
)
def test_refused(changes: tuple[str, ...], words: str, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "list.csv", tmp_path, "train.parallel=fsdp", *changes)
    with pytest.raises(ConfigError, match=f"train.parallel is fsdp and .*{words.replace('[', '.')[:20]}"):
        cfg.check_trainable()
