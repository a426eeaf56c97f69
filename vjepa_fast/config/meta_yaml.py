"""The reference's pretraining YAML, in our keys.

A file means here what it means to facebookresearch/vjepa2 (app/vjepa/train.py, read at main(), with the defaults of
app/vjepa/train.py, src/datasets/data_manager.py and src/masks/multiseq_multiblock3d.py): keys absent from the file
have the reference's defaults, keys that it never reads have no effect, and options that are not implemented here are
an error unless they are off.
"""

from __future__ import annotations

from typing import Any

from vjepa_fast.config.messages import suggest
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.config.yaml_io import describe
from vjepa_fast.errors import ConfigError

_EVALUATION = {"eval_name", "pretrain", "experiment"}
_MARKS = {"app", "folder", "meta", "data_aug", "logging", "nodes", "tasks_per_node", *_EVALUATION}
"""Top-level keys that only the reference's files have."""

_OURS = {"train", "base"}

_V1_MARKS = {
    "data": ("num_clips", "num_frames", "sampling_rate", "clip_duration", "decode_one_clip", "mask_type"),
    "loss": ("reg_coeff",),
    "optimization": ("clip_grad",),
}
"""Keys of a V-JEPA 1 file (facebookresearch/jepa), which V-JEPA 2 does not read."""

_APPS = {
    "vjepa_droid": "action-conditioned training (app: vjepa_droid)",
    "vjepa_2_1": "V-JEPA 2.1 training (app: vjepa_2_1)",
}

_REQUIRED = object()

_READ: dict[str, dict[str, Any]] = {
    "meta": {
        "load_checkpoint": None, "read_checkpoint": None, "seed": 0, "save_every_freq": -1, "skip_batches": -1,
        "use_sdpa": False, "sync_gc": False, "dtype": _REQUIRED,
    },
    "model": {
        "compile_model": False, "use_activation_checkpointing": False, "model_name": _REQUIRED,
        "pred_depth": _REQUIRED, "pred_num_heads": None, "pred_embed_dim": _REQUIRED, "uniform_power": False,
        "use_mask_tokens": False, "zero_init_mask_tokens": True, "use_rope": False, "use_silu": False,
        "use_pred_silu": False, "wide_silu": True,
    },
    "data": {
        "dataset_type": "videodataset", "datasets": [], "datasets_weights": None, "dataset_fpcs": _REQUIRED,
        "batch_size": _REQUIRED, "tubelet_size": _REQUIRED, "fps": _REQUIRED, "crop_size": 224,
        "patch_size": _REQUIRED, "pin_mem": False, "num_workers": 1, "persistent_workers": True,
    },
    "data_aug": {
        "random_resize_aspect_ratio": [3 / 4, 4 / 3], "random_resize_scale": [0.3, 1.0], "motion_shift": False,
        "reprob": 0.0, "auto_augment": False,
    },
    "loss": {"loss_exp": _REQUIRED},
    "optimization": {
        "is_anneal": False, "anneal_ckpt": None, "resume_anneal": False, "ipe": None, "ipe_scale": 1.0,
        "weight_decay": _REQUIRED, "final_weight_decay": _REQUIRED, "epochs": _REQUIRED, "warmup": _REQUIRED,
        "start_lr": _REQUIRED, "lr": _REQUIRED, "final_lr": _REQUIRED, "ema": _REQUIRED, "betas": [0.9, 0.999],
        "eps": 1e-8,
    },
}
"""Every key that the reference reads, with its default."""

_MASK_KEYS: dict[str, Any] = {
    "spatial_scale": _REQUIRED, "temporal_scale": _REQUIRED, "aspect_ratio": _REQUIRED, "num_blocks": _REQUIRED,
    "max_temporal_keep": 1.0, "max_keep": None, "full_complement": False, "pred_full_complement": False,
    "inv_block": False,
}
assert set(_MASK_KEYS) == set(MaskSpec.model_fields) - {
    "strategy", "ratio", "temporal_probability", "round_context_down"}

_OFF = {
    "data_aug.auto_augment": "data_aug.auto_augment (RandAugment)",
    "data_aug.reprob": "data_aug.reprob (random erasing)",
    "data_aug.motion_shift": "data_aug.motion_shift",
}

# The reference takes every other name for float32.
_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def is_meta(raw: dict[str, Any]) -> bool:
    """Whether a file has the reference's layout: some top-level key that only its files have."""
    return not _MARKS.isdisjoint(raw)


def convert(raw: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Our dict for the reference's, and the dotted keys that nothing reads.

    Raises:
        ConfigError: a file of another kind (V-JEPA 1, evaluation, action-conditioned), a key without which the
            reference does not run, or an option that is not implemented here.
    """
    _check_kind(raw, source)
    ignored = sorted(str(name) for name in raw if name not in {*_READ, "app", "folder", "mask"})
    values: dict[str, dict[str, Any]] = {}
    missing = [] if "folder" in raw else ["folder"]
    for section, keys in _READ.items():
        values[section] = _read(_section(raw, section, source), keys, section, missing, ignored)
    masks = raw.get("mask")
    if not isinstance(masks, list) or not masks:
        raise ConfigError(f"{source}: mask is {describe(masks)}; expected a list with one entry a mask")
    masks = [
        _read(_mapping(mask, f"mask.{index}", source), _MASK_KEYS, f"mask.{index}", missing, ignored)
        for index, mask in enumerate(masks)
    ]
    if missing:
        raise ConfigError(f"{source}: missing {', '.join(missing)}; the reference has no default for "
                          f"{'it' if len(missing) == 1 else 'them'}, so the file must say")
    return _map(raw["folder"], values, masks, source), ignored


def _check_kind(raw: dict[str, Any], source: str) -> None:
    ours = sorted(_OURS & set(raw))
    if ours:
        theirs = sorted(_MARKS & set(raw))
        raise ConfigError(f"{source} mixes the reference's layout ({', '.join(theirs)}) with ours ({', '.join(ours)}); "
                          "keep to one of them")
    if not _EVALUATION.isdisjoint(raw):
        raise ConfigError(f"{source} is an evaluation config of the reference; `train` takes a pretraining config")
    app = raw.get("app", "vjepa")
    if app in _APPS:
        raise ConfigError(f"{source}: {_APPS[app]} is not supported yet; V-JEPA 2 pretraining (app: vjepa) is")
    v1 = ["logging"] if "logging" in raw else []
    for section, names in _V1_MARKS.items():
        given = raw.get(section)
        v1 += [f"{section}.{name}" for name in names if isinstance(given, dict) and name in given]
    if "logging" in raw or len(v1) > 1:
        raise ConfigError(f"{source} is a V-JEPA 1 config ({', '.join(v1[:4])}), which is not supported yet; "
                          "expected a V-JEPA 2 config, as in configs/train of facebookresearch/vjepa2")
    if app != "vjepa":
        raise ConfigError(f"{source}: app is {describe(app)}; expected vjepa")


def _mapping(value: Any, name: str, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {name} is {describe(value)}; expected a section with keys below it")
    return value


def _section(raw: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    if name not in raw:
        raise ConfigError(f"{source}: the section {name} is missing; the reference does not run without it")
    return _mapping({} if raw[name] is None else raw[name], name, source)


def _read(
    given: dict[str, Any], keys: dict[str, Any], section: str, missing: list[str], ignored: list[str]
) -> dict[str, Any]:
    known = tuple(f"{section}.{name}" for name in keys)
    for name in given:
        if name not in keys:
            hint = suggest(f"{section}.{name}", known)
            ignored.append(f"{section}.{name}" + (f" ({hint[2:]})" if hint else ""))
    values = {name: given.get(name, default) for name, default in keys.items()}
    missing += [f"{section}.{name}" for name, value in values.items() if value is _REQUIRED]
    return values


def _map(folder: Any, values: dict[str, dict[str, Any]], masks: list[dict[str, Any]], source: str) -> dict[str, Any]:
    meta, model, data, aug, optimization = (
        dict(values[name]) for name in ("meta", "model", "data", "data_aug", "optimization"))
    for key, what in _OFF.items():
        if aug.pop(key.split(".")[1]):
            raise ConfigError(f"{source}: {what} is not supported; set it to {'0' if 'reprob' in key else 'false'}")
    if not model["use_mask_tokens"]:
        raise ConfigError(f"{source}: model.use_mask_tokens is false (the reference's default); expected true")
    if str(data.pop("dataset_type")).lower() != "videodataset":
        raise ConfigError(f"{source}: data.dataset_type is {describe(values['data']['dataset_type'])}; "
                          "expected VideoDataset")
    if meta["skip_batches"] not in (-1, 0, None):
        raise ConfigError(f"{source}: meta.skip_batches is {meta['skip_batches']}; expected -1, a resumed run "
                          "continues with the clip after the last one by itself")
    del data["persistent_workers"]

    anneal = bool(optimization.pop("is_anneal"))
    resume_anneal = bool(optimization.pop("resume_anneal"))
    load = bool(meta["load_checkpoint"])
    if anneal and optimization["anneal_ckpt"] is None:
        raise ConfigError(f"{source}: optimization.is_anneal is true but optimization.anneal_ckpt is not set; set it "
                          "to the checkpoint of the pretraining run")
    # The reference loads one of three: its own latest.pt, read_checkpoint, or anneal_ckpt; see "log/checkpointing
    # paths" in its main().
    if not (anneal and load):
        optimization["anneal_ckpt"] = None
    read = meta["read_checkpoint"] if load and not anneal else None
    dtype = str(meta["dtype"]).lower()
    return {
        "model": model,
        "mask": {"masks": masks, "truncate": "batch_min"},
        "data": {**data, "aug": {**aug, "horizontal_flip": True}},
        "loss": values["loss"],
        "optimization": {**optimization, "schedule": "linear" if anneal else "warmup_cosine"},
        "train": {
            "out": folder,
            "name": str(folder).rstrip("/").rsplit("/", 1)[-1] or "run",
            "seed": meta["seed"],
            "dtype": _DTYPES.get(dtype, meta["dtype"]),
            "save_every_freq": meta["save_every_freq"],
            "read_checkpoint": read,
            "auto_resume": load and (resume_anneal if anneal else read is None),
        },
    }
