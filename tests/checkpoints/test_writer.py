"""The last checkpoints of a run: how many there are, damage that is noticed, writing in the background."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.harness import equal
from vjepa_fast.checkpoints import writer as saving
from vjepa_fast.checkpoints.run_folder import choose_folder
from vjepa_fast.checkpoints.writer import CheckpointWriter, check_whole, copy_to_host, damage
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def contents(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((300,), float(step))}


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [(1, ["latest.pt"]), (2, ["latest.pt", "step9.pt"]), (3, ["latest.pt", "step6.pt", "step9.pt"])],
)
@pytest.mark.parametrize("background", [False, True])
def test_as_many_as_asked_for(keep_last: int, left: list[str], background: bool, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last, background)
    for step in (3, 6, 9, 12):
        writer.write(contents(step), step, tmp_path / "e0.pt" if step == 3 else None)
    writer.wait()
    assert names(tmp_path) == sorted([*left, "e0.pt"])
    for name, step in {"latest": 12, "step9": 9, "step6": 6, "e0": 3}.items():
        if (tmp_path / f"{name}.pt").exists():
            assert torch.load(tmp_path / f"{name}.pt")["step"] == step


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    writer = CheckpointWriter(tmp_path, 2)
    writer.write(contents(3), 3)
    seen, save = [], torch.save

    def watched(*args: Any) -> None:
        seen.append(damage(tmp_path / "latest.pt"))
        save(*args)

    monkeypatch.setattr(torch, "save", watched)
    writer.write(contents(6), 6, tmp_path / "e1.pt")
    assert {name: torch.load(tmp_path / name)["step"] for name in names(tmp_path)} == {
        "e1.pt": 6,
        "latest.pt": 6,
        "step3.pt": 3,
    }
    assert seen == [None]


def test_always_one_that_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at wherever a file is about to change its name or to go."""
    writer = CheckpointWriter(tmp_path, 1)
    writer.write(contents(3), 3)
    seen = []
    for module, name in ((os, "link"), (os, "replace"), (Path, "unlink")):
        original = getattr(module, name)

        def watched(*args: Any, original: Any = original, **options: Any) -> Any:
            seen.append(damage(tmp_path / "latest.pt"))
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)
    writer.write(contents(6), 6)
    assert seen and set(seen) == {None}


def test_full_disk_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at the next write, and the checkpoint before is still there."""
    writer = CheckpointWriter(tmp_path, 2, background=True)
    writer.write(contents(3), 3)
    writer.wait()

    def save(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    writer.write(contents(6), 6)
    with pytest.raises(UserError, match="disk.*full.*intact"):
        writer.write(contents(9), 9)
    writer.wait()
    assert torch.load(tmp_path / "latest.pt")["step"] == 3


def test_background_takes_a_copy_and_waits_for_the_write_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, original, written = threading.Event(), torch.save, []

    def save(value: Any, file: Any) -> None:
        assert free.wait(20)
        written.append(value["step"])
        original(value, file)

    monkeypatch.setattr(torch, "save", save)
    writer = CheckpointWriter(tmp_path, 2, background=True)
    weights = torch.ones(5)
    writer.write({"step": 3, "weights": weights}, 3)
    # Training goes on.
    weights.zero_()
    assert written == []
    begun = time.monotonic()
    threading.Timer(0.3, free.set).start()
    writer.write(contents(6), 6)
    assert time.monotonic() - begun > 0.2
    assert written[0] == 3
    writer.wait()
    assert torch.load(tmp_path / "step3.pt")["weights"].tolist() == [1.0] * 5


def test_copies_share_what_was_shared() -> None:
    weights = torch.ones(3)
    copied = copy_to_host({"a": weights, "b": [weights, (1, weights[1:])]})
    assert copied["a"] is copied["b"][0] and copied["a"] is not weights
    assert isinstance(copied["b"][1], tuple)


@pytest.fixture
def run(make: Make, tmp_path: Path) -> Path:
    make("train.max_steps=6").fit()
    return tmp_path / "run"


def test_damage_of_any_kind_is_seen_and_the_checkpoint_before_is_taken(
    run: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names(run) == ["latest.pt", "step3.pt"]
    whole, rng = (run / "latest.pt").read_bytes(), random.Random(5)
    cuts = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    flips = []
    for _ in range(20):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        flips.append(bytes(data))
    silent = 0
    expected = torch.load(run / "latest.pt", weights_only=True)
    for data in [b"", *cuts, *flips]:
        (run / "latest.pt").write_bytes(data)
        if damage(run / "latest.pt") is None:
            # Between the parts of an archive there are bytes that mean nothing.
            assert equal(torch.load(run / "latest.pt", weights_only=True), expected)
            silent += 1
    assert silent < 10
    (run / "latest.pt").write_bytes(cuts[0])
    trainer = make("train.max_steps=6", resume=True)
    assert trainer.step == 3
    said = capsys.readouterr().out
    assert re.search(r"latest\.pt\b.*\bdamaged\b", said, re.S) and re.search(r"step3\.pt\b.*\bstep 3\b", said, re.S)
    trainer.fit()
    networks = ("encoder", "predictor", "target_encoder", "opt")
    resumed = torch.load(run / "latest.pt", weights_only=True)
    assert all(equal(resumed[key], expected[key]) for key in networks)


def test_latest_is_gone(run: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "latest.pt").unlink()
    trainer = make(resume=True)
    trainer.cfg.train.out = run
    with pytest.raises(ConfigError, match=r"\brun\b.*--resume"):
        choose_folder(trainer.cfg, False)
    assert re.search(r"latest\.pt\b.*\bgone\b.*step3\.pt", capsys.readouterr().out, re.S)
    assert trainer.step == 3


def test_asked_for_while_the_others_are_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("train.max_steps=4", "train.checkpoint_every=100")
    written, largest, write = [], trainer.processes.largest, trainer.writer.write

    def waiting(value: int) -> int:
        if trainer.step == 1:
            trainer.stop.save_asked = True
        return largest(value)

    def noting(contents: dict[str, Any], step: int, also: Path | None) -> None:
        written.append(step)
        write(contents, step, also)

    monkeypatch.setattr(trainer.processes, "largest", waiting)
    monkeypatch.setattr(trainer.writer, "write", noting)
    trainer.fit()
    assert written == [3, 4]


def test_no_whole_checkpoint_is_left(run: Path, make: Make) -> None:
    for name in names(run):
        (run / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"latest\.pt.*\bno other\b"):
        make(resume=True)


def test_a_flipped_bit_in_another_checkpoint(run: Path, make: Make) -> None:
    data = bytearray((run / "latest.pt").read_bytes())
    data[len(data) // 2] ^= 4
    path = run.parent / "other.pt"
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"other\.pt.*checksum"):
        check_whole(path)
    (run / "latest.pt").unlink()
    with pytest.raises(UserError, match=r"other\.pt\b"):
        make(f"train.read_checkpoint={path}")


def test_weights_to_start_from_are_missing(make: Make) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt\b.* optimization\.anneal_ckpt=FILE"):
        make("optimization.anneal_ckpt=nowhere.pt")


def test_later_checkpoints_of_a_run_that_went_back(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 5)
    for step in (3, 6, 9):
        writer.write(contents(step), step)
    CheckpointWriter(tmp_path, 5, step=3).forget_after(3)
    assert names(tmp_path) == ["latest.pt", "step3.pt"]
    assert saving.newest_whole(tmp_path) == tmp_path / "step3.pt"
