"""What a config changes of a packaged recipe."""

from __future__ import annotations

import yaml

import vjepa_fast as vf
from vjepa_fast.config import contents, dump
from vjepa_fast.config.differences import Difference, from_nearest_recipe


def test_a_recipe_differs_from_no_recipe() -> None:
    for name in ("demo", "vitl16-256"):
        assert from_nearest_recipe(contents(vf.load_recipe(name))) == (name, [])


def test_overrides_are_what_differs() -> None:
    cfg = vf.load_recipe("vith16-256", ["optimization.lr=1e-4", "mask.masks.0.num_blocks=3", "train.out=/somewhere"])
    nearest, found = from_nearest_recipe(yaml.safe_load(dump(cfg)))
    assert nearest == "vith16-256"
    before = vf.load_recipe("vith16-256")
    assert found == [
        Difference("mask.masks.0.num_blocks", before.mask.masks[0].num_blocks, 3),
        Difference("optimization.lr", before.optimization.lr, 1e-4),
    ]


def test_keys_of_another_version() -> None:
    raw = contents(vf.load_recipe("demo"))
    del raw["train"]["seed"]
    raw["train"]["was_there_once"] = 7
    nearest, found = from_nearest_recipe(raw)
    assert nearest == "demo"
    assert found == [Difference("train.seed", 239, None), Difference("train.was_there_once", None, 7)]
