"""Two processes are one, spread out: same samples, masks and losses; a failure of one is everybody's."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest

from tests.train.tiny import tiny_config
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.train import distributed
from vjepa_fast.train.trainer import Trainer

STEPS = 4


def variants(csv_path: Path, cache: Path) -> dict[str, Config]:
    mixed = (f"data.datasets=[{csv_path}, {csv_path}]", "data.dataset_fpcs=[4, 2]")
    changes = {
        # One truncation group, half of it on each process.
        "group_across_processes": ("mask.group_size=4",),
        "a_group_each": ("mask.group_size=2",),
        "no_truncation": ("mask.truncate=none",),
        "mixed_frames": (*mixed, "mask.truncate=none"),
        "mixed_frames_truncated": (*mixed, "mask.group_size=4"),
        "accumulated": ("optimization.grad_accumulation=2",),
    }
    return {name: tiny_config(csv_path, cache, f"train.max_steps={STEPS}", *some) for name, some in changes.items()}


def train_all(rank: int, configs: dict[str, Config], folder: Path) -> int:
    for name, cfg in configs.items():
        (folder / name).mkdir(exist_ok=True)
        trainer = Trainer(cfg, folder=folder / name)
        with (folder / name / f"order_r{rank}").open("w") as file:
            original = trainer.run_step

            def run_step(batch, original=original, trainer=trainer, file=file):  # type: ignore[no-untyped-def]
                for ids, clips, masks in zip(batch.sample_ids, batch.clips, trainer._masks_of(batch), strict=True):
                    context = masks.context_ids.split(masks.context_lengths)
                    target = masks.target_ids.split(masks.target_lengths)
                    for place, sample in enumerate(ids.tolist()):
                        rows = [place + mask * len(ids) for mask in range(masks.num_masks)]
                        ids_of = [(context[row].tolist(), target[row].tolist()) for row in rows]
                        file.write(f"{batch.step} {sample} {ids_of} {int(clips[place].sum())}\n")
                return original(batch)

            trainer.run_step = run_step  # type: ignore[method-assign]
            trainer.fit()
    return 0


@pytest.fixture(scope="module")
def folders(video_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    configs = variants(video_csv, one / "cache")
    train_all(0, configs, one)
    assert distributed.launch(partial(train_all, configs=configs, folder=two), 2) == 0
    return one, two, list(configs)


def column(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_same_losses(folders: tuple[Path, Path, list[str]]) -> None:
    one, two, names = folders
    for name in names:
        a, b = column(one / name / "log_r0.csv"), column(two / name / "log_r0.csv")
        assert len(a) == len(b) == STEPS
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-6, name
        assert b == column(two / name / "log_r1.csv")


def test_same_samples_and_masks(folders: tuple[Path, Path, list[str]]) -> None:
    one, two, names = folders
    for name in names:
        alone = (one / name / "order_r0").read_text().splitlines()
        together = [line for rank in (0, 1) for line in (two / name / f"order_r{rank}").read_text().splitlines()]
        assert sorted(alone) == sorted(together), name


def fail(rank: int) -> int:
    if rank == 1:
        raise KeyError("a defect")
    # Waits for the other in a collective.
    distributed.Processes(distributed.choose_device("cpu")).wait()
    return 0


def test_defect_in_one(capfd: pytest.CaptureFixture[str]) -> None:
    """Its traceback is shown; that of the other, which only lost its peer, is not."""
    with pytest.raises(UserError, match="training process 1 of 2 failed as shown above"):
        distributed.launch(fail, 2)
    error = capfd.readouterr().err
    assert error.count("Traceback") == 1
    assert "KeyError: 'a defect'" in error


def test_no_gpu() -> None:
    if distributed.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="train.device is cuda"):
        distributed.choose_device("cuda")


@pytest.mark.parametrize(("local_rank", "task", "chosen"), [(1, "1", 0), (0, "0", 0), (1, "0", None), (1, None, None)])
def test_one_visible_gpu(
    local_rank: int, task: str | None, chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM may show each of its tasks one; processes that a task starts have none of their own."""
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if task is not None:
        monkeypatch.setenv("SLURM_LOCALID", task)
    if chosen is None:
        with pytest.raises(ConfigError, match="process 1 of this machine has no GPU of its own: torch sees 1"):
            distributed.choose_device("auto", local_rank)
    else:
        assert distributed.choose_device("auto", local_rank) == distributed.torch.device("cuda", chosen)
