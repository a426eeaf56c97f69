"""Converts V-JEPA 2.1's pretraining YAML to our keys.

A file means here what it means to facebookresearch/vjepa2 at 204698b (app/vjepa_2_1/train.py, read at main()), with one
difference in how images and videos are spread over processes: there some processes train on images only, here every
process trains on its share of both. A step has as many videos and images, and their losses have the same weights.
"""

from __future__ import annotations

from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.meta import v2
from vjepa_fast.config.meta.keys import REQUIRED, KeyReader
from vjepa_fast.config.yaml_io import describe

APP = "vjepa_2_1"

_LOSS: dict[str, Any] = {"lambda_value_img": 0.0, "lambda_value_vid": 0.0, "lambda_progressive": True}
"""Keys of `model` that are about the loss, and lie there in our layout."""

_NETWORKS: dict[str, Any] = {
    "init_type": "default",
    "img_temporal_dim_size": None,
    "interpolate_rope": False,
    "modality_embedding": False,
}

_OFF: dict[str, dict[str, Any]] = {
    "model": {
        "is_causal": False,
        "pred_is_causal": False,
        "n_registers": 0,
        "n_registers_predictor": 0,
        "has_cls_first": False,
        "normalize_predictor": False,
        "levels_predictor": 4,
    },
    "loss": {"shift_by_n": None},
    "optimization": {"use_radamw": False},
}
"""Keys with the only values that are served. The reference itself fails with registers, a class token, normalised
predictions and chopped tokens: positions, lists and rows then do not fit one another."""

READ: dict[str, dict[str, Any]] = {
    **v2.READ,
    "model": {**v2.READ["model"], **_LOSS, **_NETWORKS, **_OFF["model"]},
    "loss": {
        "loss_exp": REQUIRED,
        "predict_all": True,
        "weight_distance_loss": False,
        "offset_context_loss": False,
        **_OFF["loss"],
    },
    "optimization": {
        **v2.READ["optimization"],
        "loss_reg_std_mult": None,
        "loss_reg_num_tracking_steps": 300,
        "loss_reg_min_epoch": 50,
        **_OFF["optimization"],
    },
}
"""Every key that the reference reads, with its default."""

_IMAGES: dict[str, Any] = {
    "dataset_type": "imagenet",
    "datasets": [],
    "datasets_weights": [],
    "dataset_fpcs": REQUIRED,
    "batch_size": REQUIRED,
    "rank_ratio": 0.25,
    "num_workers": None,
    "crop_size": 512,
}


def convert(raw: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Our dict for V-JEPA 2.1's, and the dotted keys that nothing reads.

    Raises:
        ConfigError: a key without which the reference does not run, or an option that is not implemented here.
    """
    reader = KeyReader(source)
    if "folder" not in raw:
        reader.missing.append("folder")
    values = {section: reader.section(raw, section, keys) for section, keys in READ.items()}
    masks = reader.masks(raw, v2.MASK_KEYS)
    images = None
    if raw.get("img_data") is not None:
        images = reader.read(raw["img_data"], "img_data", _IMAGES)
    image_masks = None
    if raw.get("img_mask") is not None:
        if not isinstance(raw["img_mask"], list):
            raise ConfigError(
                f"{source}: img_mask is {describe(raw['img_mask'])}; expected a list with one entry a mask"
            )
        image_masks = [
            reader.read(mask, f"img_mask.{index}", v2.MASK_KEYS) for index, mask in enumerate(raw["img_mask"])
        ]
    reader.top_level(raw, {*READ, "app", "folder", "mask", "img_data", "img_mask"})
    reader.check_complete()
    _check_off(values, source)
    ours = v2.map_values(raw["folder"], values, masks, reader)
    model = ours["model"]
    loss = ours["loss"] = {**ours["loss"], **{name: model.pop(name) for name in _LOSS}}
    # Read only where context tokens are predicted, and weighed.
    loss["weight_distance_loss"] = loss["weight_distance_loss"] and loss["predict_all"]
    loss["offset_context_loss"] = loss["offset_context_loss"] and loss["weight_distance_loss"]
    init = model.pop("init_type")
    model |= {"n_output_distillation": 4, "rope_style": "interleaved", "init": "vjepa2" if init == "default" else init}
    first, last = ours["optimization"]["ema"]
    # There the momentum is never above its last value.
    ours["optimization"]["ema"] = [min(first, last), last]
    if images is not None:
        ours["img_data"] = _images(images, values["data"], source)
        ours["img_mask"] = None if image_masks is None else {"masks": image_masks, "truncate": "batch_min"}
    return ours, reader.ignored


def _check_off(values: dict[str, dict[str, Any]], source: str) -> None:
    for section, keys in _OFF.items():
        for name, served in keys.items():
            given = values[section].pop(name)
            if given != served and bool(given or served):
                raise ConfigError(
                    f"{source}: {section}.{name} is {describe(given)}, which is not supported; expected "
                    f"{describe(served)}"
                )


def _images(images: dict[str, Any], data: dict[str, Any], source: str) -> dict[str, Any]:
    kind = images.pop("dataset_type")
    if str(kind).lower() != "videodataset":
        raise ConfigError(
            f"{source}: img_data.dataset_type is {describe(kind)}; expected VideoDataset, with a CSV of paths of images"
        )
    fpcs = images.pop("dataset_fpcs")
    if fpcs != [1] * len(fpcs):
        raise ConfigError(f"{source}: img_data.dataset_fpcs is {describe(fpcs)}; expected 1 for every dataset")
    crop_size = images.pop("crop_size")
    if crop_size != data["crop_size"]:
        raise ConfigError(
            f"{source}: img_data.crop_size is {describe(crop_size)} but data.crop_size is "
            f"{describe(data['crop_size'])}; expected the same, as images and videos share a step"
        )
    return {**images, "datasets_weights": images["datasets_weights"] or None}
