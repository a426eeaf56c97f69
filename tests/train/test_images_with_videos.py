"""Training V-JEPA 2.1: videos alone, with images, with outlying losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.tiny import tiny_config
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed.parallel import without_gradient
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import StepMasks
from vjepa_fast.optim.outliers import LossOutliers
from vjepa_fast.train.images_with_videos import add_image_masks
from vjepa_fast.train.trainer import Trainer

DENSE = (
    "model.depth=4",
    "model.n_output_distillation=4",
    "model.rope_style=interleaved",
    "model.interpolate_rope=true",
    "model.img_temporal_dim_size=1",
    "model.modality_embedding=true",
    "loss.predict_all=true",
    "loss.weight_distance_loss=true",
    "loss.lambda_warmup=[1, 3]",
    "optimization.ipe=2",
    "train.checkpoint_every=2",
)


@pytest.fixture
def config(video_csv: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(*changes: str) -> Config:
        return tiny_config(video_csv, tmp_path / "cache", *DENSE, f"train.out={tmp_path / 'run'}", *changes)

    return make


def with_images(video_csv: Path) -> tuple[str, ...]:
    return (f"img_data={{datasets: ['{video_csv}'], batch_size: 6, rank_ratio: 0.5}}", "img_mask=[{num_blocks: 3}]")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_videos_alone_leave_what_is_of_images_as_it_is(config) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer(config("train.max_steps=3"))
    before = weights(trainer)
    trainer.fit()
    same = {name for name, value in weights(trainer).items() if torch.equal(value, before[name])}
    of_images = {name for name in before if "patch_embed_img" in name or "img_mod_embed" in name}
    unused = {name for name in before if "mask_tokens" in name and not name.endswith("mask_tokens.0")}
    assert same == of_images | unused


@pytest.mark.parametrize(
    "changes",
    [(), ("images",), ("model.n_output_distillation=1",), ("model.mask_token_by=mask", "model.num_mask_tokens=3")],
)
def test_data_parallelism_waits_for_no_gradient_that_never_comes(  # type: ignore[no-untyped-def]
    changes: tuple[str, ...], config, video_csv: Path
) -> None:
    trainer = Trainer(config(*with_images(video_csv) if changes == ("images",) else changes))
    batch = next(iter(trainer.loader))
    trainer.model(batch.clips, trainer.task.masks_of(batch)).loss.backward()
    trainer.loader.close()
    without = {name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None}
    ignored = without_gradient(trainer.model, trainer.cfg, 1)
    assert {name for name in ignored if not name.startswith("target_encoder")} == without


def test_with_images_and_resumed(  # type: ignore[no-untyped-def]
    config, video_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = with_images(video_csv)
    whole = Trainer(config(*images, "train.max_steps=4", f"train.out={tmp_path / 'whole'}"))
    before, batch = weights(whole), next(iter(whole.loader))
    assert [tuple(clips.shape) for clips in batch.clips] == [(4, 4, 32, 32, 3), (3, 1, 32, 32, 3)]
    masks = whole.task.masks_of(batch)
    assert [m.grid for m in masks] == [(2, 4, 4), (1, 4, 4)]
    # Each kind has its share of the loss, whatever its number of tokens.
    assert [float(m.token_weights().sum()) for m in masks] == pytest.approx([0.5, 0.5])
    assert [float(m.context_token_weights().sum()) for m in masks] == pytest.approx([0.5, 0.5])
    whole.loader.load_state_dict({"step": 0})
    whole.fit()
    after = weights(whole)
    assert {name for name in after if torch.equal(after[name], before[name])} == {
        name for name in after if "mask_tokens" in name and not name.endswith("mask_tokens.0")
    }

    Trainer(config(*images, "train.max_steps=2")).fit()
    resumed = Trainer(config(*images, "train.max_steps=4"), resume=True)
    assert resumed.step == 2
    resumed.fit()
    for name, value in weights(resumed).items():
        assert torch.equal(value, after[name]), name

    # As two processes would have written it.
    own = torch.load(tmp_path / "run" / "latest.pt")["vjepa_fast"]
    assert own["global_images"] == 3
    resumed.checkpoints._warn_of_changes(own)
    assert "changed" not in capsys.readouterr().out
    resumed.checkpoints._warn_of_changes({**own, "global_images": 6})
    assert "images a step 6 -> 3" in capsys.readouterr().out


def test_loss_of_both_is_the_mean_of_either(config, video_csv: Path) -> None:  # type: ignore[no-untyped-def]
    """In one packed pass or in two."""
    trainer = Trainer(config(*with_images(video_csv)))
    batch = next(iter(trainer.loader))
    masks = trainer.task.masks_of(batch)
    trainer.task.train_step.set_schedules(9)
    both = trainer.model(batch.clips, masks).loss
    parts = [trainer.model(clips, mask).loss for clips, mask in zip(batch.clips, masks, strict=True)]
    torch.testing.assert_close(both, parts[0] + parts[1])
    trainer.loader.close()


def test_outliers_are_skipped_and_stop_a_run(  # type: ignore[no-untyped-def]
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossOutliers, "__call__", lambda self, loss, _: torch.ones((), dtype=torch.bool))
    changes = "optimization.loss_reg_std_mult=3", "train.max_steps=12"
    trainer = Trainer(config(*changes))
    before = {name: value.clone() for name, value in trainer.model.encoder.state_dict().items()}
    with pytest.raises(UserError, match=r"\b12\b.*\bstep 12\b.*loss.*\b3\b"):
        trainer.fit()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.encoder.state_dict().items())


def test_masks_and_weights_are_the_same_at_any_number_of_processes(  # type: ignore[no-untyped-def]
    config, video_csv: Path
) -> None:
    cfg = config(*with_images(video_csv), "mask.group_size=2")
    assert cfg.img_data is not None and cfg.img_mask is not None
    cfg.img_mask.group_size = 3

    def masks_of(rank: int, world_size: int, images: int) -> list[MaskBatch]:
        cfg.img_data.batch_size = 2 * images
        videos = StepMasks(
            cfg.mask,
            fpcs=[4],
            crop_size=(32, 32),
            patch_size=8,
            tubelet_size=2,
            seed=cfg.train.seed,
            global_batch=4,
            group_of=lambda ids: np.zeros(len(ids), dtype=np.int64),
            rank=rank,
            world_size=world_size,
        )
        ids = [torch.arange(n * rank, n * rank + n) for n in (4 // world_size, images)]
        return add_image_masks(videos, cfg, rank, world_size)(0, ids, [0, 1])

    whole, parts = masks_of(0, 1, 6), [masks_of(rank, 2, 3) for rank in range(2)]
    for kind, count in enumerate((2, 3)):
        for rank, part in enumerate(parts):
            expected, found = whole[kind].narrow(rank * count, rank * count + count), part[kind]
            assert torch.equal(expected.context_ids, found.context_ids)
            assert torch.equal(expected.target_ids, found.target_ids)
            assert found.loss_weights == pytest.approx(expected.loss_weights)
            assert found.context_loss_weights == pytest.approx(expected.context_loss_weights)
            assert found.mask_token == 0
