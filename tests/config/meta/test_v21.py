"""V-JEPA 2.1's YAML: its keys in our places, its own defaults, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.meta.meta_files import SMALL, load
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import Config, ConfigWarning, dump, load_config, load_recipe

IMAGES = """
img_data: {dataset_type: VideoDataset, datasets: [/data/i.csv], dataset_fpcs: [1], batch_size: 8, crop_size: 224,
           rank_ratio: 0.5}
"""


def small(**changes: Any) -> dict[str, Any]:
    """The small file of V-JEPA 2 with what 2.1 cannot do without, and `section__key=value` changed."""
    raw = yaml.safe_load(SMALL) | {"app": "vjepa_2_1"}
    raw["model"]["use_rope"] = True
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            raw.setdefault(section, {})[key] = value
        else:
            raw[section] = value
    return raw


def with_images(**changes: Any) -> dict[str, Any]:
    raw = small(model__img_temporal_dim_size=1)
    raw["img_data"] = {**yaml.safe_load(IMAGES)["img_data"], **changes}
    return raw


def test_absent_keys_have_the_references_defaults(tmp_path: Path) -> None:
    cfg = load(tmp_path, small())
    model, loss, optimization = cfg.model, cfg.loss, cfg.optimization
    assert (model.n_output_distillation, model.rope_style, model.return_all_tokens) == (4, "interleaved", True)
    assert (model.interpolate_rope, model.modality_embedding, model.img_temporal_dim_size) == (False, False, None)
    assert (loss.predict_all, loss.weight_distance_loss, loss.lambda_progressive) == (True, False, True)
    # Not our defaults: the reference's are 0, so that its shipped files name them.
    assert (loss.lambda_value_vid, loss.lambda_value_img, loss.lambda_warmup) == (0, 0, (15_000, 30_000))
    assert (optimization.loss_reg_std_mult, cfg.img_data, cfg.img_mask) == (None, None, None)


def test_given_keys_are_taken(tmp_path: Path) -> None:
    cfg = load(
        tmp_path,
        small(
            model__lambda_value_vid=0.25,
            model__interpolate_rope=True,
            model__init_type="xavier_normal",
            model__lambda_progressive=False,
            loss__weight_distance_loss=True,
            loss__offset_context_loss=True,
            optimization__loss_reg_std_mult=3.0,
            optimization__ema=[0.999, 0.99],
        ),
    )
    assert (cfg.loss.lambda_value_vid, cfg.loss.lambda_progressive) == (0.25, False)
    assert (cfg.loss.weight_distance_loss, cfg.loss.offset_context_loss) == (True, True)
    assert (cfg.model.interpolate_rope, cfg.model.init) == (True, "xavier_normal")
    assert cfg.optimization.loss_reg_std_mult == 3.0
    # The momentum is never above its last value there.
    assert cfg.optimization.ema == (0.99, 0.99)


def test_distances_without_context_loss_have_no_effect(tmp_path: Path) -> None:
    cfg = load(
        tmp_path, small(loss__predict_all=False, loss__weight_distance_loss=True, loss__offset_context_loss=True)
    )
    assert not (cfg.loss.predict_all or cfg.loss.weight_distance_loss or cfg.loss.offset_context_loss)
    assert not cfg.model.return_all_tokens


def test_images(tmp_path: Path) -> None:
    cfg = load(tmp_path, with_images() | {"img_mask": yaml.safe_load(SMALL)["mask"]})
    assert cfg.img_data is not None and cfg.img_mask is not None
    assert (cfg.img_data.datasets, cfg.img_data.batch_size, cfg.img_data.rank_ratio) == (["/data/i.csv"], 8, 0.5)
    assert cfg.img_mask.masks[0].num_blocks == 3
    file = tmp_path / "ours.yaml"
    file.write_text(dump(cfg))
    assert load_config(file) == cfg


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (small(model__n_registers=4), "model.n_registers is 4, which is not supported; expected 0"),
        (small(model__has_cls_first=True), "model.has_cls_first is true, which is not supported; expected false"),
        (small(model__normalize_predictor=True), "model.normalize_predictor is true"),
        (small(model__levels_predictor=1), "model.levels_predictor is 1, which is not supported; expected 4"),
        (small(loss__shift_by_n=2), "loss.shift_by_n is 2"),
        (small(optimization__use_radamw=True), "optimization.use_radamw is true"),
        (small(model__use_rope=False), "model.n_output_distillation is of V-JEPA 2.1, which has rotary positions only"),
        (small(model__modality_embedding=True), "set img_temporal_dim_size to 1"),
        (with_images(dataset_type="imagenet"), "img_data.dataset_type is 'imagenet'; expected VideoDataset"),
        (with_images(dataset_fpcs=[2]), "img_data.dataset_fpcs is [2]; expected 1 for every dataset"),
        (with_images(crop_size=512), "img_data.crop_size is 512 but data.crop_size is 224"),
        (with_images(rank_ratio=0.3), "img_data.batch_size 8 times rank_ratio 0.3 is 2.4 images"),
        ({**with_images(), "img_mask": 3}, "img_mask is 3; expected a list"),
    ],
)
def test_refused(raw: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, raw)
    assert "meta.yaml" in str(caught.value) and said in str(caught.value)


REFERENCE = os.environ.get("VJEPA21_REFERENCE")
PRETRAIN = {"vitb16": "vitb16", "vitl16": "vitl16", "vitg16": "vitg16", "vitG16": "vitgigantic16"}


def as_recipe(file: Path, recipe: str) -> tuple[Config, Config]:
    """The file and the recipe, with the names and data of the recipe's user."""
    images = [] if "v2.1" not in recipe else ["img_data.datasets=[i.csv]", "img_data.datasets_weights=null"]
    fpc = 64 if "cooldown" in recipe else 16
    with pytest.warns(ConfigWarning, match="nothing reads these"):
        theirs = load_config(
            file,
            [
                "data.datasets=[a.csv]",
                "data.datasets_weights=null",
                f"data.dataset_fpcs=[{fpc}]",
                f"train.name={recipe}",
                "train.out=null",
                *images,
            ],
        )
    changes = (
        []
        if theirs.optimization.anneal_ckpt is None
        else [f"optimization.anneal_ckpt={theirs.optimization.anneal_ckpt}"]
    )
    return theirs, load_recipe(recipe, ["data.datasets=[a.csv]", *images, *changes])


@pytest.mark.skipif(not REFERENCE, reason="VJEPA21_REFERENCE names no checkout of facebookresearch/vjepa2 with 2.1")
@pytest.mark.parametrize("name", PRETRAIN)
def test_every_shipped_file_is_a_recipe(name: str) -> None:
    folder = Path(str(REFERENCE)) / "configs" / "train_2_1" / name
    assert len(list(folder.iterdir())) == 2
    for file, recipe in (("pretrain-256px-16f", "256"), ("cooldown-256px-64f", "256-64f-cooldown")):
        theirs, ours = as_recipe(folder / f"{file}.yaml", f"{PRETRAIN[name]}-{recipe}-v2.1")
        assert theirs == ours


@pytest.mark.skipif(not os.environ.get("VJEPA2_REFERENCE"), reason="VJEPA2_REFERENCE names no checkout")
@pytest.mark.parametrize(
    ("file", "recipe"),
    [
        ("vitl16/cooldown-256px-64f", "vitl16-256-64f-cooldown"),
        ("vith16/cooldown-256px-64f", "vith16-256-64f-cooldown"),
        ("vitg16/cooldown-256px-64f", "vitg16-256-64f-cooldown"),
        ("vitg16/cooldown-384px-64f", "vitg16-384-64f-cooldown"),
    ],
)
def test_cooldown_recipes(file: str, recipe: str) -> None:
    theirs, ours = as_recipe(Path(os.environ["VJEPA2_REFERENCE"]) / "configs" / "train" / f"{file}.yaml", recipe)
    assert theirs == ours
