"""Converts V-JEPA 2's pretraining YAML to our keys.

A file means here what it means to facebookresearch/vjepa2 (app/vjepa/train.py, read at main(), with the defaults of
app/vjepa/train.py, src/datasets/data_manager.py and src/masks/multiseq_multiblock3d.py): keys absent from the file
have the reference's defaults, keys that it never reads have no effect, and options that are not implemented here are
an error unless they are off.
"""

from __future__ import annotations

from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.meta.keys import DTYPES, REQUIRED, KeyReader
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.config.yaml_io import describe

_EVALUATION = {"eval_name", "pretrain", "experiment"}
_MARKS = {"app", "folder", "meta", "data_aug", "logging", "nodes", "tasks_per_node", *_EVALUATION}
"""Top-level keys that only the reference's files have."""

_OURS = {"train", "base"}

_APPS = {"vjepa_droid": "action-conditioned training (app: vjepa_droid)"}

_SERVED = ("vjepa", "vjepa_2_1")
"""Values of `app` that are pretraining, the first if there is none."""

READ: dict[str, dict[str, Any]] = {
    "meta": {
        "load_checkpoint": None,
        "read_checkpoint": None,
        "seed": 0,
        "save_every_freq": -1,
        "skip_batches": -1,
        "use_sdpa": False,
        "sync_gc": False,
        "dtype": REQUIRED,
    },
    "model": {
        "compile_model": False,
        "use_activation_checkpointing": False,
        "model_name": REQUIRED,
        "pred_depth": REQUIRED,
        "pred_num_heads": None,
        "pred_embed_dim": REQUIRED,
        "uniform_power": False,
        "use_mask_tokens": False,
        "zero_init_mask_tokens": True,
        "use_rope": False,
        "use_silu": False,
        "use_pred_silu": False,
        "wide_silu": True,
    },
    "data": {
        "dataset_type": "videodataset",
        "datasets": [],
        "datasets_weights": None,
        "dataset_fpcs": REQUIRED,
        "batch_size": REQUIRED,
        "tubelet_size": REQUIRED,
        "fps": REQUIRED,
        "crop_size": 224,
        "patch_size": REQUIRED,
        "pin_mem": False,
        "num_workers": 1,
        "persistent_workers": True,
    },
    "data_aug": {
        "random_resize_aspect_ratio": [3 / 4, 4 / 3],
        "random_resize_scale": [0.3, 1.0],
        "motion_shift": False,
        "reprob": 0.0,
        "auto_augment": False,
    },
    "loss": {"loss_exp": REQUIRED},
    "optimization": {
        "is_anneal": False,
        "anneal_ckpt": None,
        "resume_anneal": False,
        "ipe": None,
        "ipe_scale": 1.0,
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

MASK_KEYS: dict[str, Any] = {
    "spatial_scale": REQUIRED,
    "temporal_scale": REQUIRED,
    "aspect_ratio": REQUIRED,
    "num_blocks": REQUIRED,
    "max_temporal_keep": 1.0,
    "max_keep": None,
    "full_complement": False,
    "pred_full_complement": False,
    "inv_block": False,
}
assert set(MASK_KEYS) == set(MaskSpec.model_fields) - {
    "strategy",
    "ratio",
    "temporal_probability",
    "round_context_down",
}


def is_meta(raw: dict[str, Any]) -> bool:
    """Whether a file has the reference's layout: some top-level key that only its files have."""
    return not _MARKS.isdisjoint(raw)


def convert(raw: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Our dict for the reference's, and the dotted keys that nothing reads.

    Raises:
        ConfigError: a key without which the reference does not run, or an option that is not implemented here.
    """
    reader = KeyReader(source)
    if "folder" not in raw:
        reader.missing.append("folder")
    values = {section: reader.section(raw, section, keys) for section, keys in READ.items()}
    masks = reader.masks(raw, MASK_KEYS)
    reader.top_level(raw, {*READ, "app", "folder", "mask"})
    reader.check_complete()
    return map_values(raw["folder"], values, masks, reader), reader.ignored


def check_kind(raw: dict[str, Any], source: str) -> None:
    """Raises ConfigError for a file that mixes the reference's layout with ours, or is of another kind."""
    ours = sorted(_OURS & set(raw))
    if ours:
        theirs = sorted(_MARKS & set(raw))
        raise ConfigError(
            f"{source} mixes the reference's layout ({', '.join(theirs)}) with ours ({', '.join(ours)}); "
            "keep to one of them"
        )
    if not _EVALUATION.isdisjoint(raw):
        raise ConfigError(f"{source} is an evaluation config of the reference; `train` takes a pretraining config")
    app = raw.get("app", "vjepa")
    if app in _APPS:
        raise ConfigError(f"{source}: {_APPS[app]} is not supported yet; pretraining is (app: {', '.join(_SERVED)})")
    if app not in _SERVED:
        raise ConfigError(f"{source}: app is {describe(app)}; expected {' or '.join(_SERVED)}")


def map_values(
    folder: Any, values: dict[str, dict[str, Any]], masks: list[dict[str, Any]], reader: KeyReader
) -> dict[str, Any]:
    """Our dict for what was read of a file."""
    source = reader.source
    meta, model, data, aug, optimization = (
        dict(values[name]) for name in ("meta", "model", "data", "data_aug", "optimization")
    )
    reader.check_common(aug, data, meta)
    if not model["use_mask_tokens"]:
        raise ConfigError(f"{source}: model.use_mask_tokens is false (the reference's default); expected true")
    del data["persistent_workers"]

    anneal = bool(optimization.pop("is_anneal"))
    resume_anneal = bool(optimization.pop("resume_anneal"))
    load = bool(meta["load_checkpoint"])
    if anneal and optimization["anneal_ckpt"] is None:
        raise ConfigError(
            f"{source}: optimization.is_anneal is true but optimization.anneal_ckpt is not set; set it "
            "to the checkpoint of the pretraining run"
        )
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
            "dtype": DTYPES.get(dtype, meta["dtype"]),
            "save_every_freq": meta["save_every_freq"],
            "read_checkpoint": read,
            "auto_resume": load and (resume_anneal if anneal else read is None),
        },
    }
