"""The reference's YAML: every key mapped, its own defaults, nothing silently dropped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.meta.meta_files import SMALL, changed, load
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import ConfigWarning, dump, load_config


def small(**changes: Any) -> dict[str, Any]:
    """SMALL with changes; see `changed`."""
    return changed(SMALL, **changes)


def refused(tmp_path: Path, raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, raw)
    assert "meta.yaml" in str(caught.value)
    return str(caught.value)


def test_absent_keys_have_the_references_defaults(tmp_path: Path) -> None:
    file = tmp_path / "meta.yaml"
    file.write_text(SMALL)
    cfg = load_config(file)
    model, data, optimization, train = cfg.model, cfg.data, cfg.optimization, cfg.train
    assert (model.use_rope, model.uniform_power, model.use_silu, model.wide_silu) == (False, False, False, True)
    assert (model.pred_num_heads, model.num_mask_tokens, model.zero_init_mask_tokens) == (None, 2, True)
    assert (data.crop_size, data.num_workers, data.pin_mem) == ((224, 224), 1, False)
    assert data.aug.random_resize_aspect_ratio == (3 / 4, 4 / 3)
    assert data.aug.random_resize_scale == (0.3, 1.0)
    assert data.aug.horizontal_flip
    assert (optimization.ipe, optimization.ipe_scale, optimization.schedule) == (None, 1.0, "warmup_cosine")
    assert (optimization.betas, optimization.eps) == ((0.9, 0.999), 1e-8)
    assert (train.seed, train.save_every_freq, train.auto_resume, train.read_checkpoint) == (0, -1, False, None)
    assert cfg.mask.truncate == "batch_min"
    mask = cfg.mask.masks[0]
    assert (mask.max_temporal_keep, mask.max_keep, mask.full_complement, mask.inv_block) == (1.0, None, False, False)


def test_given_keys_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "meta.yaml"
    file.write_text(SMALL)
    cfg = load_config(file)
    assert (cfg.train.out, cfg.train.dtype, cfg.train.name) == (Path("/runs/small"), "bfloat16", "small")
    assert (cfg.data.datasets, cfg.data.dataset_fpcs) == (["/data/a.csv", "/data/b.npy"], [16, 8])
    assert (cfg.data.batch_size, cfg.data.fps, cfg.mask.group_size) == (6, 5, 6)
    assert (cfg.model.patch_size, cfg.model.num_frames, cfg.model.pred_embed_dim) == (14, 16, 96)
    # 1e-5 is text to the reference's parser, and would be to a plain one of ours.
    assert (cfg.optimization.start_lr, cfg.optimization.lr, cfg.optimization.final_lr) == (1e-5, 2e-4, 3e-6)
    assert (cfg.optimization.weight_decay, cfg.optimization.final_weight_decay) == (0.01, 0.02)
    assert cfg.loss.loss_exp == 2.0
    assert cfg.mask.masks[0].temporal_scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "section", "name", "expected"),
    [
        ("meta__seed", 239, "train", "seed", 239),
        ("meta__save_every_freq", 50, "train", "save_every_freq", 50),
        ("meta__dtype", "float32", "train", "dtype", "float32"),
        ("model__compile_model", True, "model", "compile_model", True),
        ("model__use_activation_checkpointing", True, "model", "use_activation_checkpointing", True),
        ("model__pred_num_heads", 12, "model", "pred_num_heads", 12),
        ("model__uniform_power", True, "model", "uniform_power", True),
        ("model__zero_init_mask_tokens", False, "model", "zero_init_mask_tokens", False),
        ("model__use_rope", True, "model", "use_rope", True),
        ("model__use_silu", True, "model", "use_silu", True),
        ("model__use_pred_silu", True, "model", "use_pred_silu", True),
        ("model__wide_silu", False, "model", "wide_silu", False),
        ("data__datasets_weights", [0.25, 0.75], "data", "datasets_weights", [0.25, 0.75]),
        ("data__crop_size", 280, "data", "crop_size", (280, 280)),
        ("data__pin_mem", True, "data", "pin_mem", True),
        ("data__num_workers", 8, "data", "num_workers", 8),
        ("data_aug__random_resize_scale", [0.5, 0.6], "aug", "random_resize_scale", (0.5, 0.6)),
        ("data_aug__random_resize_aspect_ratio", [0.9, 1.1], "aug", "random_resize_aspect_ratio", (0.9, 1.1)),
        ("optimization__ipe", 300, "optimization", "ipe", 300),
        ("optimization__ipe_scale", 1.25, "optimization", "ipe_scale", 1.25),
        ("optimization__betas", [0.8, 0.95], "optimization", "betas", (0.8, 0.95)),
        ("optimization__eps", 1e-6, "optimization", "eps", 1e-6),
        ("mask__0__max_keep", 100, "mask", "max_keep", 100),
        ("mask__0__max_temporal_keep", 0.5, "mask", "max_temporal_keep", 0.5),
        ("mask__0__full_complement", True, "mask", "full_complement", True),
        ("mask__0__pred_full_complement", True, "mask", "pred_full_complement", True),
        ("mask__0__inv_block", True, "mask", "inv_block", True),
    ],
)
def test_optional_key(key: str, value: Any, section: str, name: str, expected: Any, tmp_path: Path) -> None:
    cfg = load(tmp_path, small(**{key: value}))
    node: Any = cfg.data.aug if section == "aug" else cfg.mask.masks[0] if section == "mask" else getattr(cfg, section)
    assert getattr(node, name) == expected
    default = load(tmp_path, small())
    node = (
        default.data.aug
        if section == "aug"
        else default.mask.masks[0]
        if section == "mask"
        else getattr(default, section)
    )
    if key != "meta__dtype":
        assert getattr(node, name) != expected, "the value tried is the default, so the test shows nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"meta__use_sdpa": True},
        {"meta__sync_gc": True},
        {"meta__skip_batches": -1},
        {"data__persistent_workers": True},
        {"data__dataset_type": "VideoDataset"},
        {"data_aug__auto_augment": False},
        {"data_aug__reprob": 0.0},
        {"data_aug__motion_shift": False},
        {"app": "vjepa"},
    ],
)
def test_accepted_without_a_word(changes: dict[str, Any], tmp_path: Path) -> None:
    raw = small()
    for name, value in changes.items():
        *sections, key = name.split("__")
        (raw[sections[0]] if sections else raw)[key] = value
    assert load(tmp_path, raw) == load(tmp_path, small())


# What the reference loads at the start of a run, from its rules for load_checkpoint, read_checkpoint and anneal_ckpt.
@pytest.mark.parametrize(
    ("meta", "anneal", "auto_resume", "read", "ckpt"),
    [
        ({"load_checkpoint": False}, {}, False, None, None),
        ({"load_checkpoint": True}, {}, True, None, None),
        ({"load_checkpoint": True, "read_checkpoint": "/c.pt"}, {}, False, Path("/c.pt"), None),
        ({"load_checkpoint": False, "read_checkpoint": "/c.pt"}, {}, False, None, None),
        ({"load_checkpoint": True}, {"is_anneal": True, "anneal_ckpt": "/a.pt"}, False, None, Path("/a.pt")),
        (
            {"load_checkpoint": True},
            {"is_anneal": True, "anneal_ckpt": "/a.pt", "resume_anneal": True},
            True,
            None,
            Path("/a.pt"),
        ),
        (
            {"load_checkpoint": False},
            {"is_anneal": True, "anneal_ckpt": "/a.pt", "resume_anneal": True},
            False,
            None,
            None,
        ),
    ],
)
def test_where_a_run_starts(
    meta: dict[str, Any],
    anneal: dict[str, Any],
    auto_resume: bool,
    read: Path | None,
    ckpt: Path | None,
    tmp_path: Path,
) -> None:
    raw = small()
    raw["meta"].update(meta)
    raw["optimization"].update(anneal)
    cfg = load(tmp_path, raw)
    assert cfg.train.auto_resume is auto_resume
    assert cfg.train.read_checkpoint == read
    assert cfg.optimization.anneal_ckpt == ckpt
    assert cfg.optimization.schedule == ("linear" if anneal else "warmup_cosine")


def test_overrides_in_both_languages(tmp_path: Path) -> None:
    cfg = load(
        tmp_path,
        small(),
        "meta.seed=3",
        "optimization.lr=1e-3",
        "mask.0.num_blocks=4",
        "train.max_steps=9",
        "data.datasets=[x.csv]",
        "data.dataset_fpcs=[4]",
        "folder=runs/x",
    )
    assert (cfg.train.seed, cfg.optimization.lr, cfg.mask.masks[0].num_blocks) == (3, 1e-3, 4)
    assert (cfg.train.max_steps, cfg.data.datasets, cfg.train.out) == (9, ["x.csv"], Path("runs/x"))
    assert (cfg.model.num_frames, cfg.model.num_mask_tokens) == (4, 1)


def test_unread_keys_are_listed_once(tmp_path: Path) -> None:
    raw = small()
    raw.update(nodes=16, tasks_per_node=8)
    raw["meta"]["eval_freq"] = 100
    raw["optimization"]["weight_decy"] = 3
    raw["mask"][0]["depth"] = 3
    file = tmp_path / "meta.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.warns(ConfigWarning) as caught:
        cfg = load_config(file)
    assert len(caught) == 1
    text = str(caught[0].message)
    for name in ("nodes", "tasks_per_node", "meta.eval_freq", "mask.0.depth"):
        assert text.count(name) == 1
    assert "optimization.weight_decy (did you mean optimization.weight_decay?)" in text
    assert cfg == load(tmp_path, small())


def test_dump_is_ours_and_loads_back(tmp_path: Path) -> None:
    cfg = load(tmp_path, small(meta__load_checkpoint=True))
    file = tmp_path / "ours.yaml"
    file.write_text(dump(cfg))
    assert load_config(file) == cfg


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_aug__auto_augment": True}, "data_aug.auto_augment (RandAugment) is not supported; set it to false"),
        ({"data_aug__reprob": 0.25}, "set it to 0"),
        ({"data_aug__motion_shift": True}, "data_aug.motion_shift is not supported"),
        ({"data__dataset_type": "ImageNet"}, "data.dataset_type is 'ImageNet'; expected VideoDataset"),
        ({"model__use_mask_tokens": False}, "expected true"),
        ({"model__use_mask_tokens": ...}, "expected true"),
        ({"meta__skip_batches": 10}, "meta.skip_batches is 10"),
        ({"meta__dtype": "bf16"}, "train.dtype is 'bf16'"),
        ({"meta__dtype": ...}, "missing meta.dtype; the reference has no default for it"),
        (
            {"optimization__lr": ..., "optimization__ema": ..., "folder": ...},
            "missing folder, optimization.lr, optimization.ema; the reference has no default for them",
        ),
        ({"mask__0__num_blocks": ...}, "missing mask.0.num_blocks"),
        ({"mask": []}, "mask is []; expected a list"),
        ({"mask": [3]}, "mask.0 is 3"),
        ({"loss": ...}, "the section loss is missing"),
        ({"loss": 3}, "loss is 3; expected a section"),
        ({"optimization__is_anneal": True}, "anneal_ckpt is not set"),
        ({"optimization__lr": "x"}, "optimization.lr is 'x'; expected a number"),
        ({"data__datasets_weights": [1]}, "datasets_weights has 1 entries for 2 datasets"),
        ({"app": "vjepa_droid"}, "action-conditioned training (app: vjepa_droid) is not supported yet"),
        ({"app": "other"}, "app is 'other'; expected vjepa or vjepa_2_1"),
        ({"train": {"seed": 1}}, "mixes the reference's layout"),
        ({"eval_name": "x"}, "evaluation config"),
    ],
)
def test_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, small(**changes))


REFERENCE = os.environ.get("VJEPA2_REFERENCE")


@pytest.mark.skipif(not REFERENCE, reason="VJEPA2_REFERENCE names no checkout of facebookresearch/vjepa2")
def test_every_shipped_file() -> None:
    assert REFERENCE is not None
    files = sorted(Path(REFERENCE).glob("configs/train/**/*.yaml"))
    assert len(files) >= 8
    for file in files:
        raw = yaml.safe_load(file.read_text())
        if raw["app"] != "vjepa":
            with pytest.raises(ConfigError, match="not supported yet"):
                load_config(file)
            continue
        with pytest.warns(ConfigWarning, match=r"cpus_per_task, mem_per_gpu, nodes, tasks_per_node, meta\.eval_freq$"):
            cfg = load_config(file)
        assert cfg.model.model_name == raw["model"]["model_name"]
        assert cfg.optimization.lr == raw["optimization"]["lr"]
        assert cfg.data.datasets_weights == raw["data"]["datasets_weights"]
        assert (cfg.optimization.schedule == "linear") is raw["optimization"].get("is_anneal", False)
