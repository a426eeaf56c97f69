"""Recipes, overrides, and the text of a config."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vjepa_fast import config
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import Config, dump, load_config, load_recipe, recipe_names
from vjepa_fast.config.schema import MODEL_NAMES

FOLDER = Path(config.__file__).parent / "recipes"


def test_a_recipe_is_a_file() -> None:
    names = recipe_names()
    assert {f"{name}.yaml" for name in names} == {file.name for file in FOLDER.iterdir()}
    assert "demo" in names
    # Some file systems do not tell capital letters from small ones.
    assert len({name.lower() for name in names}) == len(names)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_trains(name: str) -> None:
    """With what it leaves to the user: datasets, and weights to start from."""
    cfg = load_recipe(name)
    changes = [] if cfg.data.datasets else ["data.datasets=a.csv"]
    if cfg.train.needs_weights:
        changes.append("train.init_weights=a.pt")
    if cfg.img_data is not None and not cfg.img_data.datasets:
        changes.append("img_data.datasets=b.csv")
    load_recipe(name, changes).check_trainable()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_says_what_it_is(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


@pytest.mark.parametrize("name", recipe_names())
def test_dump_loads_back(name: str, tmp_path: Path) -> None:
    cfg = load_recipe(name, ["data.datasets=[a.csv, 'b c.csv']", "optimization.lr=3e-5", "train.out='x: y'"])
    file = tmp_path / "printed.yaml"
    file.write_text(dump(cfg))
    again = load_config(file)
    assert again == cfg
    assert dump(again) == dump(cfg)


def test_dump_is_complete(tmp_path: Path) -> None:
    """Every key but the copies, so that the text does not depend on this version's defaults."""
    import yaml

    printed = yaml.safe_load(dump(Config()))
    assert set(printed) == set(Config.model_fields)
    assert set(Config.model_fields["model"].annotation.model_fields) - set(printed["model"]) == {
        "crop_size",
        "patch_size",
        "tubelet_size",
        "num_frames",
        "dtype",
        "return_all_tokens",
    }
    assert set(Config.model_fields["optimization"].annotation.model_fields) == set(printed["optimization"])
    assert set(Config.model_fields["train"].annotation.model_fields) == set(printed["train"])


def test_edited_dump_follows(tmp_path: Path) -> None:
    """The sizes are written once: editing data.crop_size in the printed text is enough."""
    file = tmp_path / "printed.yaml"
    file.write_text(dump(load_recipe("demo")))
    cfg = load_config(file, ["data.crop_size=[96, 128]", "train.dtype=bfloat16", "train.seed=5"])
    assert cfg.model.crop_size == (96, 128)
    assert cfg.model.dtype == "bfloat16"
    assert cfg.data.seed == 5


def test_recipe_has_the_references_values() -> None:
    cfg = load_recipe("vitg16-256")
    assert (cfg.model.model_name, cfg.model.uniform_power, cfg.model.use_rope) == ("vit_giant_xformers", True, True)
    assert (cfg.optimization.epochs, cfg.optimization.ipe, cfg.optimization.warmup) == (800, 300, 40)
    assert (cfg.optimization.lr, cfg.optimization.ema) == (5.25e-4, (0.99925, 0.99925))
    assert (cfg.data.batch_size, cfg.data.fps, cfg.train.dtype) == (24, 4, "bfloat16")


def test_without_datasets_loads_but_does_not_train() -> None:
    with pytest.raises(ConfigError, match=r"data\.datasets=\["):
        load_recipe("vitl16-256").check_trainable()
    load_recipe("vitl16-256", ["data.datasets=a.csv"]).check_trainable()
    load_recipe("demo").check_trainable()


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimization.lr=1e-4", "optimization", "lr", 1e-4),
        ("optimization.lr=1.E-4", "optimization", "lr", 1e-4),
        ("optimization.lr=1", "optimization", "lr", 1.0),
        ("optimization.ipe=1e2", "optimization", "ipe", 100),
        ("meta.seed=7", "train", "seed", 7),
        ("meta.dtype=float16", "train", "dtype", "float16"),
        ("folder=/x/y", "train", "out", Path("/x/y")),
        ("optimization.is_anneal=true", "optimization", "schedule", "linear"),
        ("data.datasets=a.csv", "data", "datasets", ["a.csv"]),
        ("data.datasets.0=2024-01-01", "data", "datasets", ["2024-01-01"]),
        ("data.datasets=[8:30]", "data", "datasets", ["8:30"]),
        ("data.crop_size=[128, 64]", "data", "crop_size", (128, 64)),
        ("data.num_workers=", "data", "num_workers", None),
    ],
)
def test_override(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_recipe("demo", [override]), section), key) == value


def test_override_inside_lists_and_sections() -> None:
    assert load_recipe("vitl16-256", ["mask.masks.1.num_blocks=9"]).mask.masks[1].num_blocks == 9
    assert load_recipe("vitl16-256", ["mask.1.num_blocks=9"]).mask.masks[1].num_blocks == 9
    assert load_recipe("demo", ["mask=[{num_blocks: 3}]"]).mask.masks[0].num_blocks == 3
    cfg = load_recipe("demo", ["data_aug.random_resize_scale=[0.5, 0.9]"])
    assert cfg.data.aug.random_resize_scale == (0.5, 0.9)
    assert cfg.data.aug.random_resize_aspect_ratio == (0.9, 1.1)
    cfg = load_recipe("demo", ["optimization={lr: 0.5}", "optimization.ipe=3"])
    assert (cfg.optimization.lr, cfg.optimization.epochs, cfg.optimization.ipe) == (0.5, 10, 3)


def test_override_of_default_masks(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("data: {datasets: [a.csv]}\n")
    masks = load_config(file, ["mask.masks.0.num_blocks=5"]).mask.masks
    assert [mask.num_blocks for mask in masks] == [5, 2]
    # A default is shared by nobody.
    assert Config().mask.masks[0].num_blocks == 8


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_every_float_survives(value: float) -> None:
    assert load_recipe("demo", [f"optimization.lr={value!r}"]).optimization.lr == value


def test_later_choice_replaces_the_alternative() -> None:
    data = load_recipe("demo", ["data.batch_size=4", "data.frame_step=2"]).data
    assert (data.batch_size, data.global_batch_size) == (4, None)
    assert (data.fps, data.duration, data.frame_step) == (None, None, 2)


def test_both_alternatives_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("data: {fps: 4, frame_step: 2}\n")
    with pytest.raises(ConfigError, match=r"\bfps\b.*frame_step.*both"):
        load_config(file)


def test_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: vitl16-256\ndata: {datasets: [v.csv], global_batch_size: 8}\noptimization: {lr: 1e-4}\n")
    cfg = load_config(file)
    assert (cfg.model.model_name, cfg.optimization.lr, cfg.optimization.warmup) == ("vit_large", 1e-4, 40)
    assert (cfg.data.batch_size, cfg.data.global_batch_size, cfg.data.datasets) == (None, 8, ["v.csv"])
    file.write_text("base: vitl\n")
    with pytest.raises(ConfigError, match="recipe.*'vitl'.*vitl16-256"):
        load_config(file)


def test_model_names_are_those_of_the_models() -> None:
    sizes = pytest.importorskip("vjepa_fast.models.sizes")
    assert tuple(sizes.SIZES) == MODEL_NAMES


def test_configs_share_nothing() -> None:
    first = load_recipe("demo", ["train.dtype=bfloat16"])
    assert Config(train=first.train).model.dtype == "bfloat16"
    assert Config().model.dtype == "float32"


def test_learned_positions_are_not_rotated() -> None:
    for change in ("model.use_rope=true", "model.model_name=vit_small_rope"):
        with pytest.raises(ConfigError, match="positions.*learned.*RoPE"):
            load_recipe("tutorial", [change])
