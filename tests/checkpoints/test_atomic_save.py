"""Checkpoint files: whole or absent; whatever else is found at the path is told in a sentence."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import tiny_config
from vjepa_fast.checkpoints import meta_format
from vjepa_fast.checkpoints.atomic_save import write_atomically
from vjepa_fast.common.errors import UserError
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.optim.adamw_ema import AdamWEMA


def small_model(*changes: str) -> VJEPA:
    return VJEPA(tiny_config(Path("a.csv"), Path("cache"), *changes).model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small_model()
    path = tmp_path / "latest.pt"
    meta_format.save_checkpoint(path, model, AdamWEMA(model), epoch=1, loss=0.5, batch_size=4, world_size=1, lr=1e-3)
    return path


@pytest.mark.parametrize("wrap", [False, True])
def test_full_disk(wrap: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def save(contents: Any, file: Any) -> None:
        file.write(b"half")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if wrap:
            raise RuntimeError("[enforce fail at inline_container.cc:672]. unexpected pos") from full
        raise full

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="disk.*full.*intact"):
        write_atomically(saved, {})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["latest.pt"]
    with pytest.raises(UserError, match="--resume$"):
        write_atomically(saved.with_name("first.pt"), {})


def test_interrupted_write_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def save(contents: Any, file: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(saved, {})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["latest.pt"]


def test_synced_before_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (events.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))[1],
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    write_atomically(tmp_path / "a.pt", {"x": 1})
    assert ".tmp" in events[0]
    assert events[1:] == ["rename", str(tmp_path)]


class _Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_damaged_files_never_raise_anything_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.read_bytes()
    rng = random.Random(3)
    damaged = [b"", b"hello", whole[: len(whole) // 2], whole[:-1]]
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(200):
            data[rng.randrange(len(data) // 50) - len(data) // 100] = rng.randrange(256)
        damaged.append(bytes(data))
    failed = 0
    for data in damaged:
        saved.write_bytes(data)
        model = small_model()
        try:
            meta_format.load_checkpoint(saved, model, AdamWEMA(model))
        except UserError as error:
            failed += 1
            assert str(saved) in str(error) or "checkpoint" in str(error)
    assert failed > 15


def test_code_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    torch.save({"encoder": _Runs()}, saved)
    with pytest.raises(UserError, match=r"latest\.pt\b.*mkdir\b"):
        meta_format.read(saved)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"opt": None}, "optimizer"),
        ({"opt": {"state": {}, "param_groups": []}}, "optimizer"),
        ({"epoch": "one"}, r"\bepoch\b"),
        ({"predictor": 3}, r"\bpredictor\b"),
    ],
)
def test_foreign_contents(change: dict[str, Any], said: str, saved: Path) -> None:
    contents = torch.load(saved, weights_only=True)
    torch.save(contents | change, saved)
    model = small_model()
    with pytest.raises(UserError, match=said):
        meta_format.load_checkpoint(saved, model, AdamWEMA(model))


def test_optimizer_state_of_another_shape(saved: Path) -> None:
    contents = torch.load(saved, weights_only=True)
    parameter = contents["opt"]["param_groups"][0]["params"][0]
    contents["opt"]["state"][parameter] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(3),
        "exp_avg_sq": torch.zeros(3),
    }
    torch.save(contents, saved)
    model = small_model()
    with pytest.raises(UserError, match=r"exp_avg of parameter \d+.*\[3\]"):
        meta_format.load_checkpoint(saved, model, AdamWEMA(model))


def test_missing_keys_are_named(saved: Path) -> None:
    torch.save({"model": {}}, saved)
    with pytest.raises(UserError, match="no encoder, predictor, target_encoder, epoch.*model"):
        meta_format.load_checkpoint(saved, small_model())


def test_model_that_does_not_fit(saved: Path) -> None:
    with pytest.raises(UserError, match=r"\bencoder\b.* patch_embed\.proj\.weight\b.*\[32, .*\[64"):
        meta_format.load_checkpoint(saved, small_model("model.embed_dim=64"))
