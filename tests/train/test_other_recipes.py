"""The tutorial recipe, and V-JEPA 1's with all its options, small: they train, and a resumed run is the same run."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from vjepa_fast.config import load_recipe
from vjepa_fast.config.schema import Config
from vjepa_fast.train.trainer import Trainer

SMALL = [
    "model.embed_dim=48",
    "model.depth=2",
    "model.num_heads=3",
    "model.pred_depth=1",
    "model.pred_embed_dim=24",
    "model.pred_num_heads=3",
    "data.crop_size=32",
    "data.patch_size=8",
    "data.dataset_fpcs=[8]",
    "data.num_workers=0",
    "optimization.ipe=2",
    "train.device=cpu",
    "train.dtype=float32",
    "train.log_every=1",
    "optimization.epochs=4",
    "optimization.warmup=0.5",
    "optimization.start_lr=1e-3",
    "optimization.lr=1e-3",
]
RECIPES = {
    "tutorial": ["data.global_batch_size=4"],
    "vitl16-224-v1": [
        "model.use_mask_tokens=false",
        "data.batch_size=4",
        "data.clips_per_video=2",
        "mask.clips_per_mask=2",
        "data.frame_step=1",
        "loss.reg_coeff=0.1",
        "optimization.clip_grad=0.5",
        "mask.masks=[{strategy: tube, ratio: 0.9, round_context_down: true}]",
    ],
}


def config(name: str, video_csv: Path, tmp_path: Path, *more: str) -> Config:
    return load_recipe(
        name, [*SMALL, *RECIPES[name], f"data.datasets=[{video_csv}]", f"data.cache_dir={tmp_path / 'cache'}", *more]
    )


def losses(folder: Path) -> list[float]:
    with (folder / "log_r0.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_same_run(name: str, video_csv: Path, tmp_path: Path) -> None:
    """Drop path and noise among the rest are drawn again as they were."""
    states = []
    for folder, stops in (("whole", [6]), ("parts", [3, 6])):
        (tmp_path / folder).mkdir()
        for stop in stops:
            cfg = config(name, video_csv, tmp_path, f"train.max_steps={stop}")
            torch.manual_seed(stop)
            trainer = Trainer(cfg, folder=tmp_path / folder, resume=stop != stops[0])
            before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
            trainer.fit()
        states.append(trainer.model.state_dict())
    whole, parts = states
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    found = losses(tmp_path / "whole")
    assert len(found) == 6 and all(map(math.isfinite, found))
    assert losses(tmp_path / "parts") == found
    for key, value in whole.items():
        fixed = "pos_embed" in key and name != "tutorial"
        assert torch.equal(value, before[key]) == fixed, key
    assert any(key.startswith("predictor.mask_tokens") for key in whole) == (name == "tutorial")


def test_the_tutorial_is_as_told(video_csv: Path, tmp_path: Path) -> None:
    """Learned positions, xavier, rates of drop path, constant momentum, one term of the loss after another."""
    cfg = load_recipe("tutorial")
    assert (cfg.model.pred_depth, cfg.model.pred_embed_dim, cfg.optimization.ema) == (6, 384, (0.996, 0.996))
    trainer = Trainer(config("tutorial", video_csv, tmp_path, "model.depth=12"), folder=tmp_path)
    model = trainer.model
    rates = [block.drop_path_rate for block in model.encoder.blocks]
    assert rates == pytest.approx([0.1 * i / 12 for i in range(12)], rel=1e-6)
    positions = model.encoder.learned_positions
    assert positions is not None
    assert (positions.temporal.shape, positions.spatial.shape) == ((1, 4, 48), (1, 16, 48))
    assert model.predictor.predictor_pos_embed is not None and model.predictor.predictor_pos_embed.requires_grad
    weight = model.encoder.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= math.sqrt(6 / (48 + 144)) < 1.01 * weight.abs().max()
    batch = next(iter(trainer.loader))
    masks = trainer.task.masks(0, batch.sample_ids, batch.group_ids)
    model.eval()
    totals = []
    for l2, reg in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        model.prediction_l2, model.reg_coeff = l2, reg
        out = model(batch.clips, masks)
        totals.append(out.loss.item())
    predictions, targets = out.packed_predictions.detach(), out.packed_targets
    assert totals[0] == pytest.approx((predictions - targets).square().mean().item() / 2, rel=1e-5)
    assert totals[1] - totals[0] == pytest.approx(0.25 * predictions.square().mean().item(), rel=1e-3)
    assert totals[2] > totals[0]
    trainer.loader.close()


def test_what_v_jepa_1_has_written_goes_on(video_csv: Path, tmp_path: Path) -> None:
    """Its script writes <name>-latest.pth.tar, with no key of ours; latest.pt comes first."""
    cfg = config("vitl16-224-v1", video_csv, tmp_path, "train.max_steps=4", "train.name=jepa")
    Trainer(cfg, folder=tmp_path).fit()
    checkpoint = torch.load(tmp_path / "latest.pt", weights_only=True)
    del checkpoint["vjepa_fast"]
    torch.save(checkpoint, tmp_path / "jepa-latest.pth.tar")
    for own in (tmp_path / "latest.pt", *tmp_path.glob("step*.pt")):
        own.unlink()
    trainer = Trainer(cfg, folder=tmp_path, resume=True)
    assert trainer.step == 4
    for name, value in trainer.model.encoder.state_dict().items():
        assert torch.equal(value, checkpoint["encoder"][f"module.backbone.{name}"])
    assert Trainer(cfg, folder=tmp_path).step == 0
