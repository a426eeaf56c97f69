"""Two and four processes are one, spread out: same samples, masks and losses; a failure of one is everybody's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.helpers import forked
from tests.helpers.comparing import column
from tests.helpers.tiny import tiny_config
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed import processes
from vjepa_fast.train.trainer import Trainer

STEPS = {"no_truncation": 10, "mixed_frames": 10}
"""Of the longer runs; the others have SHORT."""

SHORT = 4


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
    return {
        name: tiny_config(
            csv_path, cache, f"train.max_steps={STEPS.get(name, SHORT)}", "train.checkpoint_every=50", *some
        )
        for name, some in changes.items()
    }


def train_all(rank: int, configs: dict[str, Config], folder: Path) -> int:
    for name, cfg in configs.items():
        (folder / name).mkdir(exist_ok=True)
        trainer = Trainer(cfg, folder=folder / name)
        with (folder / name / f"order_r{rank}").open("w") as file:
            original = trainer.run_step

            def run_step(batch, original=original, trainer=trainer, file=file):  # type: ignore[no-untyped-def]
                for ids, clips, masks in zip(batch.sample_ids, batch.clips, trainer.task.masks_of(batch), strict=True):
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
def folders(video_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Of one process, of two and of four, a folder for each variant."""
    found = {size: tmp_path_factory.mktemp(f"of{size}") for size in (1, 2, 4)}
    configs = variants(video_csv, found[1] / "cache")
    train_all(0, configs, found[1])
    for size in (2, 4):
        some = {name: configs[name] for name in NAMES[size]}
        launch = processes.launch if size == 2 else forked.launch
        assert launch(partial(train_all, configs=some, folder=found[size]), size) == 0
    return found


NAMES = {
    2: [
        "group_across_processes",
        "a_group_each",
        "no_truncation",
        "mixed_frames",
        "mixed_frames_truncated",
        "accumulated",
    ],
    4: ["no_truncation", "mixed_frames", "mixed_frames_truncated"],
}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in NAMES.items() for name in names])
def test_same_losses(size: int, name: str, folders: dict[int, Path]) -> None:
    """Up to the order of sums. Without truncation clips have as many tokens as they have: the mean is over all."""
    one, many = column(folders[1] / name / "log_r0.csv"), column(folders[size] / name / "log_r0.csv")
    assert len(one) == len(many) == STEPS.get(name, SHORT)
    assert max(abs(x - y) / x for x, y in zip(one, many, strict=True)) <= 1e-6
    for rank in range(size):
        assert many == column(folders[size] / name / f"log_r{rank}.csv")


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in NAMES.items() for name in names])
def test_same_samples_and_masks(size: int, name: str, folders: dict[int, Path]) -> None:
    one, many = (
        sorted(
            line
            for rank in range(count)
            for line in (folders[count] / name / f"order_r{rank}").read_text().splitlines()
        )
        for count in (1, size)
    )
    assert len(one) == 4 * STEPS.get(name, SHORT)
    assert one == many


def fail(rank: int) -> int:
    if rank == 1:
        raise KeyError("a defect")
    # Waits for the other in a collective.
    processes.Processes(processes.choose_device("cpu")).wait()
    return 0


def test_defect_in_one(capfd: pytest.CaptureFixture[str]) -> None:
    """Its traceback is shown; that of the other, which only lost its peer, is not."""
    with pytest.raises(UserError, match="process 1 of 2 failed"):
        processes.launch(fail, 2)
    error = capfd.readouterr().err
    assert error.count("Traceback") == 1
    assert "KeyError: 'a defect'" in error


def test_no_gpu() -> None:
    if processes.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"train\.device.*cuda"):
        processes.choose_device("cuda")


@pytest.mark.parametrize(("local_rank", "task", "chosen"), [(1, "1", 0), (0, "0", 0), (1, "0", None), (1, None, None)])
def test_one_visible_gpu(
    local_rank: int, task: str | None, chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM may show each of its tasks one; processes that a task starts have none of their own."""
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if task is not None:
        monkeypatch.setenv("SLURM_LOCALID", task)
    if chosen is None:
        with pytest.raises(ConfigError, match=r"process 1\b.*GPU.*\b1\b"):
            processes.choose_device("auto", local_rank)
    else:
        assert processes.choose_device("auto", local_rank) == processes.torch.device("cuda", chosen)
