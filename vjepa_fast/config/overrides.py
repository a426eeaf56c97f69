"""Applies `section.key=value` overrides to a config that is still plain dicts and lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.messages import known_keys, suggest
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.config.yaml_io import describe, parse

ALIASES = {
    "folder": "train.out",
    "logging.folder": "train.out",
    "logging.write_tag": "train.name",
    "model.lambda_value_img": "loss.lambda_value_img",
    "model.lambda_value_vid": "loss.lambda_value_vid",
    "model.lambda_progressive": "loss.lambda_progressive",
    "data.sampling_rate": "data.frame_step",
    "data.clip_duration": "data.duration",
    "meta.dtype": "train.dtype",
    "meta.seed": "train.seed",
    "meta.save_every_freq": "train.save_every_freq",
    "meta.load_checkpoint": "train.auto_resume",
    "meta.read_checkpoint": "train.read_checkpoint",
    "optimization.resume_anneal": "train.auto_resume",
    "data_aug.random_resize_scale": "data.aug.random_resize_scale",
    "data_aug.random_resize_aspect_ratio": "data.aug.random_resize_aspect_ratio",
}
"""Keys of the reference that are ours under another name; `optimization.is_anneal` is the one with another value."""

_NOT_OURS = {
    "img_data.crop_size": "images have the size of the videos; set data.crop_size alone",
    "img_data.dataset_fpcs": "it is 1 for every dataset of images; leave it out",
    "data.num_frames": "it is data.dataset_fpcs here, a list, as in data.dataset_fpcs=[16]",
    "data.num_clips": "it is data.clips_per_video here, and data.batch_size counts clips",
}
"""Keys of the reference's files that cannot be overridden by themselves, and what to do instead."""

EXCLUSIVE = (("fps", "duration", "frame_step"), ("batch_size", "global_batch_size"))
"""Keys of `data` of which one at most may be set: a later layer that sets one clears the others."""


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, section by section; lists and scalars are replaced whole."""
    merged = dict(base)
    for group in EXCLUSIVE:
        if any(top.get(name) is not None for name in group):
            for name in group:
                merged.pop(name, None)
    for name, value in top.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def split(text: str) -> tuple[str, Any]:
    """`a.b=value` -> (our dotted key, value parsed as YAML)."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {text!r}: expected section.key=value, as in optimization.lr=1e-4")
    value = parse(value_text, f"override {text!r}")
    if key == "optimization.is_anneal":
        if not isinstance(value, bool):
            raise ConfigError(f"override {text!r}: expected true or false")
        return "optimization.schedule", "linear" if value else "warmup_cosine"
    parts = key.split(".")
    if parts[0] in ("mask", "img_mask") and len(parts) > 1 and parts[1].isdecimal():
        key = ".".join([parts[0], "masks", *parts[1:]])
    return ALIASES.get(key, key), value


def _index(items: list[Any], part: str, key: str, text: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        entries = "1 entry" if len(items) == 1 else f"{len(items)} entries"
        accepted = f"0 to {len(items) - 1}" if items else "none, the list is empty"
        raise ConfigError(f"override {text!r}: {key} has {entries}; {part!r} is not one (accepted: {accepted})")
    return int(part)


def _set(config: dict[str, Any], key: str, value: Any, text: str) -> None:
    parts = key.split(".")
    node: Any = config
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        if isinstance(node, list):
            index = _index(node, part, path, text)
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                for group in EXCLUSIVE if path == "data" and value is not None else ():
                    if part in group:
                        for name in group:
                            node.pop(name, None)
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise ConfigError(
                f"override {text!r}: {path} is {describe(node)}, which has no keys below it{suggest(key)}"
            )


def apply(config: dict[str, Any], overrides: Iterable[str], default_masks: list[MaskSpec]) -> dict[str, str]:
    """Write the overrides into `config`, in order.

    Args:
        config: changed in place.
        overrides: each `section.key=value`; the keys are ours or the reference's, the values YAML.
        default_masks: what `mask.masks.N.key=value` refers to in a config that has no masks of its own.

    Returns:
        Dotted key -> the override as written.

    Raises:
        ConfigError: not of that form, not YAML, an unknown key, or an index that a list does not have.
    """
    written = {}
    for text in overrides:
        key, value = split(text)
        if key in _NOT_OURS:
            raise ConfigError(f"override {text!r}: {_NOT_OURS[key]}")
        generic = ".".join("0" if part.isdecimal() else part for part in key.split("."))
        if not any(
            f"{known}.".startswith(f"{generic}.") or f"{generic}.".startswith(f"{known}.") for known in known_keys()
        ):
            raise ConfigError(f"override {text!r}: {key} is not a key{suggest(key, known_keys() + tuple(ALIASES))}")
        if key.startswith("mask.masks."):
            mask = config.get("mask")
            masks = mask if isinstance(mask, list) else (mask or {}).get("masks")
            if masks is None:
                masks = [spec.model_dump(mode="json") for spec in default_masks]
            config["mask"] = {**(mask if isinstance(mask, dict) else {}), "masks": masks}
        if isinstance(value, dict) and key.count(".") == 0 and isinstance(config.get(key), dict):
            config[key] = merge(config[key], value)
        else:
            _set(config, key, value, text)
        written[key] = f"override {text!r}"
    return written
