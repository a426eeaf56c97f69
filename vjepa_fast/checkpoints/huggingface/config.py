"""Converts config.json of Hugging Face's VJEPA2Model and VJEPA2ForVideoClassification, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.models.sizes import size_of


def to_hf_config(
    cfg: ModelConfig,
    num_pooler_layers: int | None = None,
    labels: Mapping[str, Any] | None = None,
    num_labels: int | None = None,
    predictor: bool = True,
) -> dict[str, Any]:
    """What config.json holds for a model of ours.

    Args:
        cfg: with crop_size and num_frames.
        num_pooler_layers: self-attention layers of the attentive probe; None: there is no probe.
        labels: name of each class of the probe by its number.
        num_labels: classes of the probe, where they have no names.
        predictor: there is one; else its sizes are left to transformers' defaults.

    Raises:
        UserError: transformers has no such model.
    """
    size = size_of(cfg)
    assert cfg.crop_size is not None
    unfit = [
        (cfg.n_output_distillation is not None, "the parts of V-JEPA 2.1; transformers has V-JEPA 2 only"),
        (cfg.objective == "pixels" and predictor, "a predictor of pixels; transformers has one of features only"),
        (not cfg.use_mask_tokens, "noised targets in place of mask tokens; transformers has mask tokens only"),
        (not cfg.use_rope, "sine-cosine or learned positions; transformers has RoPE only"),
        (cfg.use_rope and cfg.rope_style != "tiled", "RoPE as in V-JEPA 2.1; transformers has that of V-JEPA 2 only"),
        (cfg.use_silu or cfg.use_pred_silu, "SwiGLU; transformers has plain MLPs only"),
        (cfg.num_frames == 1, "the patch embedding of an image model; transformers has that of videos only"),
        (
            cfg.crop_size[0] != cfg.crop_size[1],
            f"a grid of {cfg.crop_size[0]} x {cfg.crop_size[1]} pixels; transformers has square ones only",
        ),
    ]
    for holds, what in unfit:
        if holds:
            raise UserError(f"Hugging Face's V-JEPA 2 cannot hold this model: it has {what}")
    config: dict[str, Any] = {
        "model_type": "vjepa2",
        "architectures": ["VJEPA2Model" if num_pooler_layers is None else "VJEPA2ForVideoClassification"],
        "patch_size": cfg.patch_size,
        "crop_size": cfg.crop_size[0],
        "frames_per_clip": cfg.num_frames,
        "tubelet_size": cfg.tubelet_size,
        "hidden_size": size.embed_dim,
        "in_chans": 3,
        "num_attention_heads": size.num_heads,
        "num_hidden_layers": size.depth,
        "mlp_ratio": size.mlp_ratio,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "drop_path_rate": cfg.drop_path_rate,
        "torch_dtype": "float32",
    }
    if predictor:
        config |= {
            "pred_hidden_size": cfg.pred_embed_dim,
            "pred_num_attention_heads": cfg.pred_num_heads or size.num_heads,
            "pred_num_hidden_layers": cfg.pred_depth,
            "pred_num_mask_tokens": cfg.num_mask_tokens or 1,
            "pred_zero_init_mask_tokens": cfg.zero_init_mask_tokens,
            "pred_mlp_ratio": 4.0,
        }
    if num_pooler_layers is not None:
        config["num_pooler_layers"] = num_pooler_layers
        names = {str(key): value for key, value in (labels or {}).items()}
        names = names or {str(number): f"LABEL_{number}" for number in range(num_labels or 0)}
        config |= {"id2label": names, "label2id": {value: int(key) for key, value in names.items()}}
    return config


def from_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that a config.json names.

    Raises:
        UserError: a setting that no model of ours has.
    """
    wanted = {"hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6, "in_chans": 3, "pred_mlp_ratio": 4.0}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json has {name}={config[name]!r}; expected {value!r}, as all released models have")
    fields = {
        "embed_dim": ("hidden_size", 1024),
        "depth": ("num_hidden_layers", 24),
        "num_heads": ("num_attention_heads", 16),
        "mlp_ratio": ("mlp_ratio", 4.0),
        "patch_size": ("patch_size", 16),
        "crop_size": ("crop_size", 256),
        "num_frames": ("frames_per_clip", 64),
        "tubelet_size": ("tubelet_size", 2),
        "pred_embed_dim": ("pred_hidden_size", 384),
        "pred_depth": ("pred_num_hidden_layers", 12),
        "pred_num_heads": ("pred_num_attention_heads", 12),
        "num_mask_tokens": ("pred_num_mask_tokens", 10),
        "zero_init_mask_tokens": ("pred_zero_init_mask_tokens", True),
    }
    return {ours: config.get(name, default) for ours, (name, default) in fields.items()} | {"use_rope": True}
