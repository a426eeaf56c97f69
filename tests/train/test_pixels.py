"""The masked autoencoder: its loss and gradient against plain PyTorch, training, resuming, loading."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.errors import ConfigError
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
                tokens.append(torch.cat([
                    (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
                    for x in channels], 1))
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_loss_and_gradient_against_plain_pytorch(exponent: float) -> None:
    cfg = vf.load_recipe("demo", ["model.objective=pixels", f"loss.loss_exp={exponent}", "data.crop_size=24"])
    torch.manual_seed(0)
    model = vf.VJEPA(cfg.model, **cfg.loss.model_options()).double()
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


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ConfigError, match="objective is pixels"):
        vf.load_recipe("demo", ["model.objective=pixels", "model.n_output_distillation=1"])
