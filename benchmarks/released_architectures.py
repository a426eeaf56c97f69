"""Every released architecture of V-JEPA, as keys of our model config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A released model.

    Attributes:
        name: as it is called.
        version: `v1`, `v2`, `v2.1`: whose modules it is of.
        model: fields of ModelConfig.
        key: the encoder that its users load.
        heads: of its attentive probes; None: there are none.
        action: it has an action-conditioned predictor.
    """

    name: str
    version: str
    model: Mapping[str, Any]
    key: str = "target_encoder"
    heads: int | None = 16
    action: bool = False


def _v1(name: str, model: str, crop: int) -> Architecture:
    return Architecture(
        name,
        "v1",
        {
            "model_name": model,
            "use_rope": False,
            "uniform_power": True,
            "crop_size": crop,
            "num_frames": 16,
            "num_mask_tokens": 2,
        },
    )


def _v2(name: str, model: str, crop: int) -> Architecture:
    return Architecture(
        name,
        "v2",
        {"model_name": model, "crop_size": crop, "num_frames": 64, "pred_num_heads": 12, "num_mask_tokens": 10},
    )


def _v21(name: str, model: str, **more: Any) -> Architecture:
    fields = {
        "model_name": model,
        "crop_size": 384,
        "num_frames": 64,
        "pred_num_heads": 12,
        "num_mask_tokens": 8,
        "rope_style": "interleaved",
        "interpolate_rope": True,
        "img_temporal_dim_size": 1,
        "modality_embedding": True,
        "return_all_tokens": True,
        "n_output_distillation": 4,
        "pred_depth": 24,
    }
    key = more.pop("key", "target_encoder")
    return Architecture(name, "v2.1", fields | more, key, heads=None)


_DISTILLED: dict[str, Any] = {
    "key": "ema_encoder",
    "n_output_distillation": 1,
    "teacher_embed_dim": 1664,
    "pred_depth": 12,
}

ARCHITECTURES = (
    _v1("V-JEPA ViT-L/16", "vit_large", 224),
    _v1("V-JEPA ViT-H/16", "vit_huge", 224),
    _v1("V-JEPA ViT-H/16-384", "vit_huge", 384),
    _v2("V-JEPA 2 ViT-L/16", "vit_large", 256),
    _v2("V-JEPA 2 ViT-H/16", "vit_huge", 256),
    _v2("V-JEPA 2 ViT-g/16", "vit_giant_xformers", 256),
    _v2("V-JEPA 2 ViT-g/16-384", "vit_giant_xformers", 384),
    Architecture(
        "V-JEPA 2-AC ViT-g/16",
        "v2",
        {"model_name": "vit_giant_xformers", "crop_size": 256, "num_frames": 64, "pred_depth": 24},
        heads=None,
        action=True,
    ),
    _v21("V-JEPA 2.1 ViT-B/16", "vit_base", **_DISTILLED),
    _v21("V-JEPA 2.1 ViT-L/16", "vit_large", **_DISTILLED),
    _v21("V-JEPA 2.1 ViT-g/16", "vit_giant_xformers"),
    _v21("V-JEPA 2.1 ViT-G/16", "vit_gigantic_xformers"),
)
V21_DEPTHS = {"depth": 12, "pred_depth": 4}
"""The least that the reference's V-JEPA 2.1 can be built with."""
