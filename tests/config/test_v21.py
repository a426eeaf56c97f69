"""The keys of V-JEPA 2.1: what belongs together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import load_recipe, recipe_names
from vjepa_fast.config.schema import Config

DENSE = ["model.n_output_distillation=4", "loss.predict_all=true"]
IMAGES = [*DENSE, "model.img_temporal_dim_size=1", "img_data.datasets=[a.csv]"]


def test_the_second_head_follows_the_loss() -> None:
    assert load_recipe("demo", DENSE).model.return_all_tokens
    assert not load_recipe("demo", DENSE[:1]).model.return_all_tokens


def test_images_beside_videos() -> None:
    cfg = load_recipe("demo", [*IMAGES, "img_data.rank_ratio=0.5", "img_mask=[{num_blocks: 3}]"])
    assert cfg.img_data is not None and (cfg.img_data.batch_size, cfg.img_data.rank_ratio) == (72, 0.5)
    assert cfg.img_mask is not None and cfg.img_mask.masks[0].num_blocks == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.predict_all=true"], "set model.n_output_distillation to 4 as well"),
        ([*DENSE, "model.return_all_tokens=false"], "model.return_all_tokens is false but loss.predict_all is true"),
        (["model.modality_embedding=true"], "model.modality_embedding tells videos from images"),
        (["model.teacher_embed_dim=1664"], "model.teacher_embed_dim is of V-JEPA 2.1"),
        (["model.n_output_distillation=2"], "model.n_output_distillation is 2; expected 1 or 4"),
        (["model.img_temporal_dim_size=2"], "model.img_temporal_dim_size is 2; expected 1"),
        (
            ["loss.weight_distance_loss=true"],
            "loss.weight_distance_loss and offset_context_loss weigh the loss of context",
        ),
        ([*DENSE, "loss.offset_context_loss=true"], "loss.offset_context_loss is about distances"),
        ([*DENSE, "loss.lambda_warmup=[5, 5]"], "loss.lambda_warmup is [5, 5]; expected two steps"),
        (["img_mask=[{}]"], "img_mask is set but img_data is not"),
        ([*DENSE, "img_data.datasets=[a]"], "set model.img_temporal_dim_size to 1"),
        ([*IMAGES, "img_data.batch_size=3"], "img_data.batch_size 3 times rank_ratio 0.25 is 0.75 images"),
        ([*IMAGES, "img_data.rank_ratoi=0.5"], "did you mean img_data.rank_ratio?"),
    ],
)
def test_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", overrides)
    assert said in str(caught.value)


def test_images_to_train_on_are_missing() -> None:
    cfg = load_recipe("vitl16-256-v2.1", ["data.datasets=[a.csv]"])
    with pytest.raises(ConfigError, match=r"img_data\.datasets.*img_data=null img_mask=null"):
        cfg.check_trainable()
    load_recipe("vitl16-256-v2.1", ["data.datasets=[a.csv]", "img_data=null", "img_mask=null"]).check_trainable()


def test_distilled_models_are_not_trained() -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher_embed_dim.*\b1664\b"):
        load_recipe("demo", ["model.n_output_distillation=1", "model.teacher_embed_dim=1664"]).check_trainable()


def test_metas_names_of_the_losses_weights() -> None:
    cfg = load_recipe("vitl16-256-v2.1", ["model.lambda_value_img=0.25", "model.lambda_progressive=false"])
    assert cfg.loss.lambda_value_img == 0.25 and not cfg.loss.lambda_progressive


def test_recipes_decode_images_with_as_many_processes_as_videos() -> None:
    for name in recipe_names():
        images = load_recipe(name, ["data.num_workers=1"]).img_data
        assert images is None or images.num_workers is None, name


def test_a_mask_of_images_by_its_number() -> None:
    cfg = load_recipe("vitl16-256-v2.1", ["img_mask.0.num_blocks=4"])
    assert cfg.img_mask is not None and cfg.img_mask.masks[0].num_blocks == 4


def test_dump_loads_back_with_images() -> None:
    cfg: Any = load_recipe("demo", IMAGES)
    assert Config.model_validate(cfg.model_dump(mode="json")) == cfg
