"""The training loop in this process: what is skipped, what stops it, what it says when it goes on."""

from __future__ import annotations

import csv
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import tiny_config
from tests.helpers.trainer_fixtures import poison
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.train import pretraining
from vjepa_fast.train.monitor import recovery
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_non_finite_gradients_skip_the_step(dtype: str, make: Make, tmp_path: Path) -> None:
    trainer = make(f"train.dtype={dtype}", "train.max_steps=4")
    poison(trainer, range(2, 3))
    # Where all steps before are skipped, as the first of float16 are, encoder and target encoder would be one.
    with torch.no_grad():
        for parameter in trainer.model.target_encoder.parameters():
            parameter.add_(1e-3)
    before: dict[int, dict[str, torch.Tensor]] = {}
    original = trainer.run_step

    def run_step(batch: Any) -> Any:
        before[trainer.step] = snapshot(trainer)
        return original(batch)

    trainer.run_step = run_step  # type: ignore[method-assign]
    trainer.fit()
    for name, value in before[2].items():
        if not name.startswith("target_encoder"):
            assert torch.equal(value, before[3][name]), name
    moved = "target_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(before[2][moved], before[3][moved])
    with (tmp_path / "run" / "log_r0.csv").open() as file:
        skipped = [row["skipped"] for row in csv.DictReader(file)]
    assert skipped[2] == "1"
    if dtype != "float16":
        # Its scaler has to come down from a scale at which gradients overflow.
        assert skipped == ["0", "0", "1", "0"]
        trained = "encoder.blocks.0.attn.qkv.weight"
        assert not torch.equal(before[1][trained], before[2][trained])


def test_gradients_that_stay_non_finite_stop_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert recovery.MAX_SKIPPED == 50
    monkeypatch.setattr(recovery, "MAX_SKIPPED", 6)
    trainer = make()
    poison(trainer, range(5, 100))
    with pytest.raises(UserError, match=r"finite.*\b7 steps.*\bstep 12\b"):
        trainer.fit()
    checkpoint = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in checkpoint["encoder"].values())


def test_scaler_state_goes_on(make: Make) -> None:
    trainer = make("train.dtype=float16", "train.max_steps=3")
    poison(trainer, range(1, 2))
    trainer.fit()
    assert trainer.task.train_step.scaler is not None
    state = trainer.task.train_step.scaler.state_dict()
    assert state["scale"] < 65536
    resumed = make("train.dtype=float16", resume=True)
    assert resumed.task.train_step.scaler is not None
    assert resumed.task.train_step.scaler.state_dict() == state


def test_broken_videos_are_replaced_and_listed(make: Make, video_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    listed = tmp_path / "list.csv"
    listed.write_text(video_csv.read_text() + f"{tmp_path}/text.mp4 0\n{tmp_path}/gone.mp4 0\n")
    options = ("data.max_broken=0.5", "train.max_steps=6")
    make(*options, csv_path=listed).fit()
    path = tmp_path / "run" / "broken_r0.tsv"
    with path.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {Path(row["path"]).name for row in rows} == {"text.mp4", "gone.mp4"}
    assert {row["dataset"] for row in rows} == {str(listed)}
    assert {row["reason"] for row in rows} == {
        "the file does not exist",
        "FFmpeg cannot read it: Invalid data found when processing input",
    }
    before = path.read_text()
    make("data.max_broken=0.5", "train.max_steps=8", csv_path=listed, resume=True).fit()
    assert path.read_text() == before


def test_too_many_broken_videos(make: Make, video_csv: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(video_csv.read_text() + f"{tmp_path}/gone.mp4 0\n")
    with pytest.raises(UserError, match=r"(?s)data\.max_broken=0\.1.*gone\.mp4: .*exist"):
        make(csv_path=listed).fit()
    assert "gone.mp4" in (tmp_path / "run" / "broken_r0.tsv").read_text()


def test_harmful_changes_are_named(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("train.max_steps=3").fit()
    capsys.readouterr()
    make(
        "train.seed=5",
        "mask.masks.1.num_blocks=3",
        "data.global_batch_size=2",
        "mask.group_size=2",
        "train.log_every=7",
        resume=True,
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert lines == [
        "changed since the checkpoint was written: mask.masks.1.num_blocks 1 -> 3, mask.group_size 4 -> 2, train.seed "
        "239 -> 5, clips a step 4 -> 2; the run continues, but differently than without the change"
    ]
    make("train.max_steps=3", "data.num_workers=1", resume=True)
    assert "changed" not in capsys.readouterr().out


def test_change_of_decoder_is_named(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of what decodes, whatever the key says."""
    make("train.max_steps=3").fit()
    make("train.max_steps=3", "data.backend=pyav", resume=True)
    assert "changed" not in capsys.readouterr().out
    monkeypatch.setattr(pretraining, "choose", lambda backend, device: "dali")
    make("train.max_steps=3", resume=True)
    assert "changed since the checkpoint was written: decoder pyav -> dali; the run" in capsys.readouterr().out
    path = tmp_path / "run" / "latest.pt"
    contents = torch.load(path, weights_only=True)
    del contents["vjepa_fast"]["backend"]
    torch.save(contents, path)
    make("train.max_steps=3", resume=True)
    assert "changed" not in capsys.readouterr().out


def test_fallback_to_pyav_on_a_gpu_is_said_with_the_reason(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining.dali, "missing", lambda device: "DALI is not installed; install it")
    said = "PyAV decodes, on the CPU: DALI is not installed; install it\n"
    for backend, device, expected in [("auto", "cuda", True), ("pyav", "cuda", False), ("auto", "cpu", False)]:
        trainer = make(f"data.backend={backend}")
        trainer.task.device = torch.device(device)
        trainer.task.announce()
        assert (said in capsys.readouterr().out) == expected


def test_checkpoints_kept_for_good(make: Make, tmp_path: Path) -> None:
    make("train.max_steps=12", "train.save_every_freq=2").fit()
    assert sorted(path.name for path in (tmp_path / "run").glob("e*.pt")) == ["e0.pt", "e2.pt"]
    kept = torch.load(tmp_path / "run" / "e2.pt", weights_only=True)
    assert kept["epoch"] == 3
    assert list(kept) == [
        "encoder",
        "predictor",
        "target_encoder",
        "opt",
        "scaler",
        "epoch",
        "loss",
        "batch_size",
        "world_size",
        "lr",
        "vjepa_fast",
    ]


def test_profile(make: Make, video_csv: Path, tmp_path: Path) -> None:
    """Also of a run that ends before the recording does."""
    cfg = tiny_config(video_csv, tmp_path / "cache", "train.max_steps=7")
    Trainer(cfg, folder=tmp_path, profile=True).fit()
    assert "aten::" in (tmp_path / "profile" / "operators.txt").read_text()


def test_outputs_of_steps_do_not_pile_up_until_they_are_logged(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("train.max_steps=5", "train.log_every=5", "train.checkpoint_every=5")
    original, made, alive = trainer.run_step, [], []

    def watched(batch: Any) -> Any:
        alive.append(sum(reference() is not None for reference in made))
        result = original(batch)
        made.append(weakref.ref(result.output.packed_predictions))
        return result

    monkeypatch.setattr(trainer, "run_step", watched)
    trainer.fit()
    # While a step is made, the one before it is still there.
    assert alive == [0, 1, 1, 1, 1]


def test_probes_need_the_clips_of_the_demo(make: Make, tmp_path: Path) -> None:
    assert make("train.probe=auto").cfg.train.probe is False
    with pytest.raises(ConfigError, match=r"train\.probe.*labels"):
        make("train.probe=true", f"train.out={tmp_path / 'other'}")
