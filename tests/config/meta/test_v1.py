"""V-JEPA 1's YAML: every key mapped, its own defaults, nothing silently dropped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.meta.meta_files import changed, load
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import ConfigWarning, dump, load_config, load_recipe

# Every required key and no other, with values that are nobody's default.
SMALL = """
logging: {folder: /runs/small, write_tag: tiny}
meta: {dtype: BFLOAT16}
data:
  datasets: [/data/a.csv, /data/b.npy, /data/c.csv]
  batch_size: 6
  num_clips: 2
  num_frames: 8
  sampling_rate: 3
  tubelet_size: 2
  patch_size: 14
data_aug: {}
loss: {loss_exp: 2.0, reg_coeff: 0.1}
mask:
- {spatial_scale: [0.2, 0.3], temporal_scale: [0.5, 1.0], aspect_ratio: [0.5, 2.0], num_blocks: 3}
- {spatial_scale: [0.7, 0.7], temporal_scale: [1.0, 1.0], aspect_ratio: [0.5, 2.0], num_blocks: 2}
model: {model_name: vit_base, pred_depth: 5, pred_embed_dim: 96}
optimization:
  weight_decay: 0.01
  final_weight_decay: 0.02
  epochs: 7
  warmup: 2
  start_lr: 1e-5
  lr: 2e-4
  final_lr: 3e-6
  ema: [0.99, 1.0]
"""


def small(**changes: Any) -> dict[str, Any]:
    """SMALL with changes; see `changed`."""
    return changed(SMALL, **changes)


def test_absent_keys_have_the_references_defaults(tmp_path: Path) -> None:
    cfg = load(tmp_path, small())
    model, data, optimization, train = cfg.model, cfg.data, cfg.optimization, cfg.train
    # Unlike V-JEPA 2's.
    assert (model.uniform_power, model.use_mask_tokens, model.zero_init_mask_tokens) == (True, True, True)
    assert (model.use_rope, model.init, model.mask_token_by) == (False, "vjepa1", "mask")
    # One for each mask, however many datasets there are; heads as the encoder.
    assert (model.num_mask_tokens, model.pred_num_heads) == (2, None)
    assert (data.crop_size, data.num_workers, data.pin_mem, data.filter_short_videos) == ((224, 224), 1, False, False)
    assert data.aug.random_resize_aspect_ratio == (3 / 4, 4 / 3) and data.aug.horizontal_flip
    assert (optimization.ipe, optimization.ipe_scale, optimization.clip_grad) == (None, 1.0, None)
    assert (train.seed, train.save_every_freq, train.auto_resume, train.read_checkpoint) == (0, -1, False, None)
    assert [mask.strategy for mask in cfg.mask.masks] == ["multiblock", "multiblock"]


def test_given_keys_are_taken(tmp_path: Path) -> None:
    cfg = load(tmp_path, small(optimization__clip_grad=10.0, data__filter_short_videos=True, meta__seed=234))
    assert (cfg.train.out, cfg.train.name, cfg.train.dtype) == (Path("/runs/small"), "tiny", "bfloat16")
    assert (cfg.data.dataset_fpcs, cfg.data.frame_step, cfg.data.fps) == ([8, 8, 8], 3, None)
    # Six videos are twelve clips, which share six sets of masks.
    assert (cfg.data.batch_size, cfg.data.clips_per_video, cfg.mask.clips_per_mask) == (12, 2, 2)
    assert (cfg.data.split_videos, cfg.data.round_fps, cfg.mask.group_size) == (True, False, 12)
    assert (cfg.loss.loss_exp, cfg.loss.reg_coeff, cfg.optimization.clip_grad) == (2.0, 0.1, 10.0)
    assert (cfg.optimization.start_lr, cfg.optimization.ema, cfg.train.seed) == (1e-5, (0.99, 1.0), 234)
    assert cfg.data.filter_short_videos
    assert cfg.mask.masks[0].temporal_scale == (0.5, 1.0)


def test_duration_comes_before_the_sampling_rate(tmp_path: Path) -> None:
    data = load(tmp_path, small(data__clip_duration=2.5)).data
    assert (data.duration, data.frame_step, data.fps) == (2.5, None, None)
    data = load(tmp_path, small(data__clip_duration=2.5, data__sampling_rate=...)).data
    assert data.duration == 2.5


def test_tubes(tmp_path: Path) -> None:
    cfg = load(tmp_path, small(data__mask_type="random_tube", mask=[{"ratio": 0.9}]))
    (mask,) = cfg.mask.masks
    assert (mask.strategy, mask.ratio, mask.round_context_down) == ("tube", 0.9, True)


def test_noised_targets(tmp_path: Path) -> None:
    assert not load(tmp_path, small(model__use_mask_tokens=False)).model.use_mask_tokens


@pytest.mark.parametrize(
    ("meta", "auto_resume", "read"),
    [
        ({"load_checkpoint": False, "read_checkpoint": "a.pth.tar"}, False, None),
        ({"load_checkpoint": True, "read_checkpoint": "a.pth.tar"}, False, Path("/runs/small/a.pth.tar")),
        ({"load_checkpoint": True}, True, None),
    ],
)
def test_where_a_run_starts(meta: dict[str, Any], auto_resume: bool, read: Path | None, tmp_path: Path) -> None:
    raw = small()
    raw["meta"].update(meta)
    train = load(tmp_path, raw).train
    assert (train.auto_resume, train.read_checkpoint) == (auto_resume, read)


def test_overrides_in_both_languages(tmp_path: Path) -> None:
    cfg = load(tmp_path, small(), "logging.folder=/x", "data.sampling_rate=5", "meta.seed=3", "mask.1.num_blocks=4")
    assert (cfg.train.out, cfg.data.frame_step, cfg.train.seed, cfg.mask.masks[1].num_blocks) == (Path("/x"), 5, 3, 4)
    assert load(tmp_path, small(), "data.clip_duration=2").data.duration == 2


def test_dump_is_ours_and_loads_back(tmp_path: Path) -> None:
    cfg = load(tmp_path, small(optimization__clip_grad=10.0))
    file = tmp_path / "ours.yaml"
    file.write_text(dump(cfg))
    assert load_config(file) == cfg


def test_unread_keys_are_listed_once(tmp_path: Path) -> None:
    raw = small()
    raw.update(nodes=16)
    raw["meta"]["eval_freq"] = 100
    raw["data"]["fps"] = 4
    raw["optimization"]["clip_gard"] = 3
    file = tmp_path / "meta.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.warns(ConfigWarning) as caught:
        cfg = load_config(file)
    assert len(caught) == 1
    text = str(caught[0].message)
    for name in ("nodes", "meta.eval_freq", "data.fps"):
        assert text.count(name) == 1
    assert "optimization.clip_gard (did you mean optimization.clip_grad?)" in text
    assert cfg == load(tmp_path, small())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_aug__auto_augment": True}, "data_aug.auto_augment (RandAugment) is not supported; set it to false"),
        ({"data__dataset_type": "ImageNet"}, "data.dataset_type is 'ImageNet'; expected VideoDataset"),
        ({"data__mask_type": "tubes"}, "data.mask_type is 'tubes'; expected multiblock3d or random_tube"),
        ({"data__mask_type": "random_tube"}, "missing mask.0.ratio, mask.1.ratio"),
        ({"data__sampling_rate": ...}, "missing data.sampling_rate; the reference has no default for it"),
        ({"loss__reg_coeff": ..., "logging__write_tag": ...}, "missing logging.write_tag, loss.reg_coeff"),
        ({"data__num_clips": 0}, "data.num_clips is 0; expected a whole number, at least 1"),
        ({"data__batch_size": "x"}, "data.batch_size is 'x'; expected a whole number"),
        ({"optimization__clip_grad": 0}, "optimization.clip_grad is 0; expected more than 0"),
        ({"logging": ...}, "the section logging is missing"),
        ({"mask": []}, "mask is []; expected a list"),
        ({"meta__skip_batches": 10}, "meta.skip_batches is 10"),
        ({"train": {"seed": 1}}, "mixes the reference's layout"),
        ({"eval_name": "x"}, "evaluation config"),
    ],
)
def test_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, small(**changes))
    assert "meta.yaml" in str(caught.value) and said in str(caught.value)


REFERENCE = os.environ.get("VJEPA1_REFERENCE")


@pytest.mark.skipif(not REFERENCE, reason="VJEPA1_REFERENCE names no checkout of facebookresearch/jepa")
def test_every_shipped_file() -> None:
    assert REFERENCE is not None
    files = sorted(Path(REFERENCE).glob("configs/pretrain/*.yaml"))
    assert len(files) >= 3
    for file in files:
        raw = yaml.safe_load(file.read_text())
        with pytest.warns(ConfigWarning, match=r": nodes, tasks_per_node, meta\.eval_freq$"):
            cfg = load_config(file, ["data.datasets=[a.csv]"])
        assert (cfg.model.model_name, cfg.data.crop_size[0]) == (raw["model"]["model_name"], raw["data"]["crop_size"])
        assert cfg.optimization.lr == raw["optimization"]["lr"]
        assert (cfg.optimization.clip_grad, cfg.model.num_mask_tokens) == (10, 2)
        recipe = load_recipe(
            {"vitl16": "vitl16-224-v1", "vith16": "vith16-224-v1", "vith16_384": "vith16-384-v1"}[file.stem],
            ["data.datasets=[a.csv]", f"train.out={cfg.train.out}", f"train.name={cfg.train.name}"],
        )
        assert recipe == cfg
    for file in sorted(Path(REFERENCE).glob("configs/evals/*.yaml")):
        with pytest.raises(ConfigError, match="evaluation config"):
            load_config(file)
