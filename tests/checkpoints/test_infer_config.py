"""The config of a model is told from the names and shapes of its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vjepa_fast as vf
from tests.checkpoints import models
from vjepa_fast.checkpoints import infer_config, meta_format
from vjepa_fast.checkpoints.huggingface.config import to_hf_config
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config import dump
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer


def states(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], ModelConfig]:
    sizes = {"crop_size": 256, "num_frames": 16, "patch_size": 16, "tubelet_size": 2}
    cfg = ModelConfig.model_validate({**sizes, **fields})
    with torch.device("meta"):
        return VisionTransformer(cfg).state_dict(), Predictor(cfg).state_dict(), cfg


@pytest.mark.parametrize("tokens", [8192, 2048, 18432])
def test_table_of_released_rope_models_is_not_taken_for_sincos(tokens: int) -> None:
    encoder, predictor, _ = states({"model_name": "vit_large", "pred_num_heads": 12, "num_mask_tokens": 10})
    encoder["pos_embed"] = torch.zeros(1, tokens, 1024, device="meta")
    found, notes = infer_config.guess(encoder, predictor)
    assert found.use_rope and "use_rope=true" in notes[0]
    assert found.crop_size == ((384, 384) if tokens == 18432 else (256, 256))
    assert infer_config.guess(encoder, predictor, overrides={"use_rope": False})[0].use_rope is False


@pytest.mark.parametrize(
    "changes",
    [
        {"use_silu": True},
        {"use_silu": True, "wide_silu": False, "use_pred_silu": True},
        {"mlp_ratio": 3.3},
        {"mlp_ratio": 48 / 11},
        {"depth": 5, "pred_depth": 1},
        {"use_rope": False},
        {"use_rope": False, "uniform_power": True},
        {"use_rope": False, "positions": "learned"},
    ],
    ids=str,
)
def test_fields_come_back(changes: dict[str, Any]) -> None:
    made = models.model(**changes)
    found, _ = infer_config.guess(
        made.encoder.state_dict(), made.predictor.state_dict(), overrides=models.NOT_IN_SHAPES
    )
    keys = ["use_silu", "use_pred_silu", "use_rope", "positions"]
    keys += ["uniform_power", "crop_size", "num_frames"] if not found.use_rope else []
    for key in keys:
        assert getattr(found, key) == getattr(made.cfg, key), key
    with torch.device("meta"):
        for module, own in ((VisionTransformer(found), made.encoder), (Predictor(found), made.predictor)):
            assert infer_config.differences(module.state_dict(), own.state_dict()) == ""


def test_what_was_assumed_is_said() -> None:
    made = models.model()
    found, notes = infer_config.guess(made.encoder.state_dict(), made.predictor.state_dict())
    assert any(re.search(r"(?<!pred_)num_heads\b.*\b1\b", note) for note in notes)
    assert any("pred_num_heads" in note for note in notes)
    assert found.num_heads == 1


def test_an_override_that_does_not_fit_is_told_with_what_would(tmp_path: Path) -> None:
    made = models.model()
    torch.save(models.contents(made), tmp_path / "c.pt")
    with pytest.raises(UserError) as error:
        vf.load(tmp_path / "c.pt", **models.NOT_IN_SHAPES, depth=5, embed_dim=192)
    text = str(error.value)
    assert re.search(r"patch_embed\.proj\.weight\b.*\[96, 3, 2, 16, 16\].*\[192, 3, 2, 16, 16\]", text)
    assert re.search(r"\bmissing .*blocks\.3\.norm1\.weight", text)
    assert "model.model_name=vit_tiny model.embed_dim=96 model.depth=3" in text
    with pytest.raises(ConfigError, match=r"\bnum_head\b"):
        vf.load(tmp_path / "c.pt", num_head=3)
    with pytest.raises(ConfigError, match="rope_style.*'round'"):
        vf.load(tmp_path / "c.pt", rope_style="round")


def test_an_image_model_of_something_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"encoder.*no patch_embed\.proj\.weight"):
        infer_config.guess({"conv1.weight": torch.zeros(1)})


V21 = {
    "n_output_distillation": 4,
    "rope_style": "interleaved",
    "interpolate_rope": True,
    "img_temporal_dim_size": 1,
    "modality_embedding": True,
    "return_all_tokens": True,
    "depth": 4,
    "pred_depth": 4,
}


def v21_model(**changes: Any) -> vf.VJEPA:
    torch.manual_seed(0)
    fields = {**models.MODEL, **V21, "crop_size": 64, "num_frames": 8, "patch_size": 16, "tubelet_size": 2, **changes}
    return vf.VJEPA(ModelConfig.model_validate(fields)).eval()


def test_v21_is_told_by_its_parts(tmp_path: Path) -> None:
    made = v21_model()
    torch.save(models.contents(made), tmp_path / "c.pt")
    model = vf.load(tmp_path / "c.pt", **models.NOT_IN_SHAPES)
    for key in V21:
        assert getattr(model.cfg, key) == getattr(made.cfg, key), key
    clips = models.clips()
    assert torch.equal(model.encode(clips), made.target_encoder(clips))
    assert model.predict(clips, torch.tensor([1, 2])).shape == (2, 2, 4 * models.WIDTH)
    assert model.predict_future(clips[:, :1], 2).shape == (2, 16, 4 * models.WIDTH)
    # An image has a patch embedding of its own.
    assert model.grid_of(clips[:, :1]) == (1, 4, 4)
    assert torch.equal(model.encode(clips[:, 0]), made.target_encoder(clips[:, :1]))
    last, first = model.encode(clips, out_layers=[-1, 0])
    assert torch.equal(last, model.encode(clips)) and first.shape == last.shape


def test_v21_checkpoint_with_a_config_of_v2(tmp_path: Path) -> None:
    torch.save(models.contents(v21_model()), tmp_path / "c.pt")
    with pytest.raises(UserError) as error:
        meta_format.load_checkpoint(tmp_path / "c.pt", models.model(depth=4))
    text = str(error.value)
    assert "missing norm.weight" in text and "unexpected " in text
    assert "model.n_output_distillation=4" in text and "V-JEPA 2.1" in text


def test_v21_has_no_counterpart_in_transformers() -> None:
    with pytest.raises(UserError, match=r"parts of V-JEPA 2\.1"):
        to_hf_config(v21_model().cfg)


def test_distilled_v21(tmp_path: Path) -> None:
    made = v21_model(n_output_distillation=1, teacher_embed_dim=112)
    contents = models.contents(made)
    contents["ema_encoder"] = contents.pop("target_encoder")
    torch.save(contents, tmp_path / "c.pt")
    model = vf.load(tmp_path / "c.pt", **models.NOT_IN_SHAPES)
    assert model.weights == "ema_encoder" and model.cfg.teacher_embed_dim == 112
    assert model.cfg.n_output_distillation == 1
    assert model.predict(models.clips(), torch.tensor([1, 2])).shape == (2, 2, 112)


def test_noised_targets_are_told_by_absent_mask_tokens(tmp_path: Path) -> None:
    torch.save(models.contents(models.model(use_mask_tokens=False)), tmp_path / "c.pt")
    model = vf.load(tmp_path / "c.pt", **models.NOT_IN_SHAPES)
    assert not model.cfg.use_mask_tokens
    with pytest.raises(UserError, match="noised targets"):
        model.predict(models.clips(), torch.tensor([1]))


def test_the_yaml_of_the_training_says_the_rest(tmp_path: Path) -> None:
    made = models.model()
    torch.save(models.contents(made), tmp_path / "c.pt")
    (tmp_path / "c.yaml").write_text(dump(models.config()))
    model = vf.load(tmp_path / "c.pt", config=tmp_path / "c.yaml")
    assert model.cfg.num_heads == models.HEADS and model.cfg.crop_size == (models.CROP, models.CROP)
    assert model.data["fps"] == 8 and model.assumed == []
    # One of V-JEPA 2.1 with the YAML of V-JEPA 2.
    torch.save(models.contents(v21_model()), tmp_path / "v21.pt")
    with pytest.raises(UserError, match=r"not fit.*V-JEPA 2\.1"):
        vf.load(tmp_path / "v21.pt", config=tmp_path / "c.yaml", depth=4, pred_depth=4)
    with pytest.raises(ConfigError, match=r"gone\.yaml\b"):
        vf.load(tmp_path / "c.pt", config=tmp_path / "gone.yaml")
