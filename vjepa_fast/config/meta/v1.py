"""Converts V-JEPA 1's pretraining YAML to our keys.

A file means here what it means to facebookresearch/jepa (app/vjepa/train.py, read at main(), with the defaults of its
mask collators and of src/datasets/video_dataset.py): keys absent from the file have the reference's defaults, keys that
it never reads have no effect, and options that are not implemented here are an error unless they are off.

A batch holds `batch_size` videos there, with `num_clips` clips of each, and clips here; the clips of a video share
their masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.meta.keys import DTYPES, REQUIRED, KeyReader
from vjepa_fast.config.yaml_io import describe

_MARKS = {
    "data": ("num_clips", "num_frames", "sampling_rate", "clip_duration", "decode_one_clip", "mask_type"),
    "loss": ("reg_coeff",),
    "optimization": ("clip_grad",),
}
"""Keys that V-JEPA 2 does not read."""

_READ: dict[str, dict[str, Any]] = {
    "logging": {"folder": REQUIRED, "write_tag": REQUIRED},
    "meta": {
        "load_checkpoint": None,
        "read_checkpoint": None,
        "seed": 0,
        "save_every_freq": -1,
        "skip_batches": -1,
        "use_sdpa": False,
        "dtype": REQUIRED,
    },
    "model": {
        "model_name": REQUIRED,
        "pred_depth": REQUIRED,
        "pred_embed_dim": REQUIRED,
        "uniform_power": True,
        "use_mask_tokens": True,
        "zero_init_mask_tokens": True,
    },
    "data": {
        "dataset_type": "videodataset",
        "mask_type": "multiblock3d",
        "datasets": [],
        "datasets_weights": None,
        "batch_size": REQUIRED,
        "num_clips": REQUIRED,
        "num_frames": REQUIRED,
        "tubelet_size": REQUIRED,
        "sampling_rate": None,
        "clip_duration": None,
        "crop_size": 224,
        "patch_size": REQUIRED,
        "pin_mem": False,
        "num_workers": 1,
        "filter_short_videos": False,
        "decode_one_clip": True,
        "log_resource_utilization": False,
    },
    "data_aug": {
        "random_resize_aspect_ratio": [3 / 4, 4 / 3],
        "random_resize_scale": [0.3, 1.0],
        "motion_shift": False,
        "reprob": 0.0,
        "auto_augment": False,
    },
    "loss": {"loss_exp": REQUIRED, "reg_coeff": REQUIRED},
    "optimization": {
        "ipe": None,
        "ipe_scale": 1.0,
        "clip_grad": None,
        "weight_decay": REQUIRED,
        "final_weight_decay": REQUIRED,
        "epochs": REQUIRED,
        "warmup": REQUIRED,
        "start_lr": REQUIRED,
        "lr": REQUIRED,
        "final_lr": REQUIRED,
        "ema": REQUIRED,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
    },
}
"""Every key that the reference reads, with its default."""

_MASKS: dict[str, dict[str, Any]] = {
    "multiblock3d": {
        "spatial_scale": REQUIRED,
        "temporal_scale": REQUIRED,
        "aspect_ratio": REQUIRED,
        "num_blocks": REQUIRED,
        "max_temporal_keep": 1.0,
        "max_keep": None,
    },
    "random_tube": {"ratio": REQUIRED},
}
"""By data.mask_type."""

_UNUSED = ("decode_one_clip", "log_resource_utilization")
"""Keys of data that the reference hands on and that change no clip."""


def is_v1(raw: dict[str, Any]) -> bool:
    """Whether a file of the reference's layout is one of V-JEPA 1."""
    found = [
        name
        for section, names in _MARKS.items()
        for name in names
        if isinstance(raw.get(section), dict) and name in raw[section]
    ]
    return "logging" in raw or len(found) > 1


def convert(raw: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Our dict for V-JEPA 1's, and the dotted keys that nothing reads.

    Raises:
        ConfigError: a key without which the reference does not run, or an option that is not implemented here.
    """
    reader = KeyReader(source)
    values = {section: reader.section(raw, section, keys) for section, keys in _READ.items()}
    data = values["data"]
    mask_type = data["mask_type"]
    if mask_type not in _MASKS:
        raise ConfigError(
            f"{source}: data.mask_type is {describe(mask_type)}; expected {' or '.join(_MASKS)} (the "
            "reference takes every other name for random_tube)"
        )
    masks = reader.masks(raw, _MASKS[mask_type])
    if data["sampling_rate"] is None and data["clip_duration"] is None:
        reader.missing.append("data.sampling_rate")
    reader.top_level(raw, {*_READ, "app", "mask"})
    reader.check_complete()
    for name in ("batch_size", "num_clips"):
        if isinstance(data[name], bool) or not isinstance(data[name], int) or data[name] < 1:
            raise ConfigError(f"{source}: data.{name} is {describe(data[name])}; expected a whole number, at least 1")
    return _map(values, masks, reader), reader.ignored


def _map(values: dict[str, dict[str, Any]], masks: list[dict[str, Any]], reader: KeyReader) -> dict[str, Any]:
    meta, model, data, aug = (dict(values[name]) for name in ("meta", "model", "data", "data_aug"))
    reader.check_common(aug, data, meta)
    for name in _UNUSED:
        del data[name]
    if data.pop("mask_type") == "random_tube":
        masks = [{"strategy": "tube", "round_context_down": True, **mask} for mask in masks]
    num_clips = data.pop("num_clips")
    duration, frame_step, num_frames = (data.pop(name) for name in ("clip_duration", "sampling_rate", "num_frames"))
    out = values["logging"]["folder"]
    return {
        "model": {**model, "use_rope": False, "init": "vjepa1", "mask_token_by": "mask"},
        "mask": {"masks": masks, "truncate": "batch_min", "clips_per_mask": num_clips},
        "data": {
            **data,
            "dataset_fpcs": [num_frames],
            "batch_size": data["batch_size"] * num_clips,
            "clips_per_video": num_clips,
            "split_videos": True,
            "round_fps": False,
            # A duration comes first there.
            **({"frame_step": frame_step} if duration is None else {"duration": duration}),
            "aug": {**aug, "horizontal_flip": True},
        },
        "loss": values["loss"],
        "optimization": {**values["optimization"], "schedule": "warmup_cosine"},
        "train": {
            "out": out,
            "name": values["logging"]["write_tag"],
            "seed": meta["seed"],
            "dtype": DTYPES.get(str(meta["dtype"]).lower(), meta["dtype"]),
            "save_every_freq": meta["save_every_freq"],
            **_start(meta, str(out)),
        },
    }


def _start(meta: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a run continues: the file named, relative to the folder, else what lies in the folder."""
    named = meta["read_checkpoint"] if meta["load_checkpoint"] else None
    return {
        "auto_resume": bool(meta["load_checkpoint"]) and named is None,
        "read_checkpoint": None if named is None else str(Path(folder) / str(named)),
    }
