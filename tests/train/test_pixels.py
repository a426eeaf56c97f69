"""The masked autoencoder: its loss and gradient against plain PyTorch, training, resuming, loading."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import vjepa_fast as vf
from vjepa_fast.checkpoints.open import open_checkpoint
from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.inference.videos import default_sampling, list_videos, read_clips
from vjepa_fast.models.pixels import num_pixels
from vjepa_fast.train.trainer import Trainer


@pytest.fixture
def make_pixels(make: Callable[..., Trainer]) -> Callable[..., Trainer]:
    return functools.partial(make, "model.objective=pixels")


def plain_targets(clips: torch.Tensor, tubelet: int, patch: int) -> torch.Tensor:
    """float64 [B, N, 3 * tubelet * patch^2], written out with loops over the tokens."""
    b, t, h, w, _ = clips.shape
    tokens = []
    for frame in range(0, t, tubelet):
        for row in range(0, h, patch):
            for col in range(0, w, patch):
                cube = clips[:, frame : frame + tubelet, row : row + patch, col : col + patch].double() / 255
                channels = [cube[..., c].reshape(b, -1) for c in range(3)]
                tokens.append(
                    torch.cat(
                        [
                            (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
                            for x in channels
                        ],
                        1,
                    )
                )
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_loss_and_gradient_against_plain_pytorch(exponent: float) -> None:
    cfg = vf.load_recipe("demo", ["model.objective=pixels", f"loss.loss_exp={exponent}", "data.crop_size=24"])
    torch.manual_seed(0)
    model = vf.VJEPA.from_config(cfg).double()
    clips = torch.randint(0, 256, (3, 8, 24, 24, 3), dtype=torch.uint8)
    # A flat patch: its deviation is 0.
    clips[0, :2, :8, :8] = 77
    masks = vf.MaskSampler(cfg.mask, grid=(4, 3, 3), seed=1)(step=0, sample_ids=np.arange(3))
    output = model(clips, masks)
    assert output.packed_predictions.shape[1] == num_pixels(2, 8) == 384
    targets = plain_targets(clips, 2, 8)
    given = torch.arange(3).repeat_interleave(torch.tensor(masks.target_lengths[:3]))
    expected = targets[given, masks.target_ids.long()]
    torch.testing.assert_close(output.packed_targets.double(), expected, rtol=1e-4, atol=1e-4)
    distance = (output.packed_predictions - expected).abs() ** exponent / exponent
    by_clip = distance.mean(1)
    plain = by_clip.mean()
    torch.testing.assert_close(output.loss.double(), plain, rtol=1e-5, atol=0)
    weight = model.predictor.predictor_proj.weight
    parameters = [weight, model.encoder.blocks[0].attn.qkv.weight]
    ours = torch.autograd.grad(output.loss, parameters, retain_graph=True)
    for mine, theirs in zip(ours, torch.autograd.grad(plain, parameters), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_no_teacher_runs(make_pixels: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_pixels()
    monkeypatch.setattr(trainer.model.target_encoder, "forward_packed", None)
    result = trainer.run_step(next(iter(trainer.loader)))
    trainer.loader.close()
    assert torch.isfinite(result.loss)


def test_training_resumes_to_the_bit_and_loads(make_pixels: Callable[..., Trainer], tmp_path: Path) -> None:
    make_pixels("train.max_steps=6").fit()
    log = tmp_path / "run" / "metrics.jsonl"
    whole = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    make_pixels("train.max_steps=3").fit()
    make_pixels("train.max_steps=6", resume=True).fit()
    assert json.loads(log.read_text().splitlines()[-1])["loss"] == whole[-1]
    model = vf.load(tmp_path / "run")
    clips = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    assert model.encode(clips).shape == (1, 32, 32)


def run(*args: object) -> str:
    """What a command says."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_probe_and_embed_read_what_was_trained(
    make_pixels: Callable[..., Trainer], video_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student, as the moving average has hardly moved; the average on demand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trainer = make_pixels("train.max_steps=3")
    trainer.fit()
    checkpoint, videos = tmp_path / "run", read_manifest(str(video_csv))[0]
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text("".join(f"{path} {number % 2}\n" for number, path in enumerate(videos[:6])))
    val.write_text("".join(f"{path} {number % 2}\n" for number, path in enumerate(videos[6:])))
    for asked, weights in ((), "encoder"), (("--weights", "target_encoder"), "target_encoder"):
        out = tmp_path / weights
        run("probe", "--checkpoint", checkpoint, "--train", train, "--val", val, "--epochs", 1, "--out", out, *asked)
        found = json.loads((out / "results.json").read_text())
        assert found["weights"] == weights and set(found["probes"]) == {"baseline", "linear", "knn", "attentive"}
        features = out / "features.safetensors"
        assert f"of the {weights}" in run("embed", val, "--checkpoint", checkpoint, "--out", features, *asked)
        model = vf.load(checkpoint, weights=weights)
        sampling = default_sampling(model, None, None, None, 1)
        clips = read_clips(list_videos([str(val)]).open(0), sampling)
        assert torch.equal(load_file(features)[str(videos[6])], model.encode(clips)[0])
    own = vf.load(checkpoint).encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trainer.model.encoder.state_dict().items())
    assert not torch.equal(own["norm.weight"], trainer.model.target_encoder.norm.weight)


def test_commands_that_compare_features_refuse_pixels(
    make_pixels: Callable[..., Trainer], video_csv: Path, tmp_path: Path
) -> None:
    make_pixels("train.max_steps=3").fit()
    out = tmp_path / "out"
    for args, message in (
        (
            ("probe", "--checkpoint", tmp_path / "run", "--val", video_csv, "--task", "horizon", "--out", out),
            "predicts pixels (model.objective=pixels), and this task compares features",
        ),
        (("convert", tmp_path / "run", tmp_path / "hf", "--to", "hf"), "it has a predictor of pixels"),
    ):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output


def test_a_run_on_features_keeps_its_teacher(make: Callable[..., Trainer], tmp_path: Path) -> None:
    make("train.max_steps=3").fit()
    assert open_checkpoint(tmp_path / "run").choose() == "target_encoder"


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ConfigError, match=r"objective.*pixels"):
        vf.load_recipe("demo", ["model.objective=pixels", "model.n_output_distillation=1"])
