"""Exports V-JEPA weights to Meta's layout, to one .safetensors file, or to a Hugging Face folder.

What is written appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import vjepa_fast
from vjepa_fast.checkpoints import infer_config, meta_format
from vjepa_fast.checkpoints.atomic_save import write_atomically
from vjepa_fast.checkpoints.huggingface import weights as huggingface
from vjepa_fast.checkpoints.huggingface.config import to_hf_config
from vjepa_fast.checkpoints.huggingface.probe import classifier_to_hf
from vjepa_fast.checkpoints.open import METADATA_KEY, WEIGHTS_FILE, Checkpoint, Layout
from vjepa_fast.common.atomic import atomic_path, disk_errors
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import ModelConfig

_KEPT_DATA = ("fps", "duration", "frame_step", "crop_size")
_PROCESSOR_FILE = "video_preprocessor_config.json"
_AGAIN = "give the command once more"


def probe_heads(checkpoint: Checkpoint, given: int | None = None) -> int:
    """Heads of a checkpoint's attentive probes.

    Args:
        checkpoint: with classifiers.
        given: what the user says; None: what the file says, else the 16 of all evaluations of the reference.
    """
    heads: int = given or checkpoint.probe_heads or 16
    return heads


def write(
    checkpoint: Checkpoint,
    cfg: ModelConfig,
    weights: str,
    dst: Path,
    layout: Layout,
    *,
    probe: int = 0,
    heads: int | None = None,
) -> Path:
    """Writes what a checkpoint holds in another layout.

    Args:
        checkpoint: from open_checkpoint.
        cfg: of the model it is of.
        weights: key of the encoder to write. In the reference's layout all encoders of the file are written under
            their own keys, and `weights` also under those that the file lacks.
        dst: new file (.pt for `meta`, .safetensors for `fast`), or new folder (`hf`, `fast`).
        layout: `meta`, `hf` or `fast`.
        probe: which of its attentive probes goes into a Hugging Face folder.
        heads: of the probes; see probe_heads.

    Returns:
        What was written: the file, or the folder of `hf`.

    Raises:
        ConfigError: there is something at `dst` already.
        UserError: the layout cannot hold the model, or the disk is full or cannot be written.
    """
    if layout == "fast" and dst.suffix != ".safetensors":
        dst = dst / WEIGHTS_FILE
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise ConfigError(f"{dst} exists; give another name or remove it")
    if layout == "meta":
        write_atomically(dst, to_meta(checkpoint, cfg, weights, heads))
    elif layout == "fast":
        with disk_errors(dst, "checkpoint", _AGAIN):
            dst.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(dst) as temporary:
                _save(*to_fast(checkpoint, cfg, weights, heads), temporary)
    else:
        files = to_hf_files(checkpoint, cfg, weights, probe, heads)
        with disk_errors(dst, "folder", _AGAIN), _atomic_folder(dst) as temporary:
            for name, contents in files.items():
                if name == WEIGHTS_FILE:
                    _save(contents, {"format": "pt"}, temporary / name)
                else:
                    (temporary / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return dst


def to_meta(checkpoint: Checkpoint, cfg: ModelConfig, weights: str, heads: int | None = None) -> dict[str, Any]:
    """What torch.save writes for the reference: its hub reads `encoder`, its evaluations `target_encoder`."""
    encoders = {key: checkpoint.encoders[weights] for key in ("encoder", "target_encoder", weights)}
    contents: dict[str, Any] = {
        key: _prefixed(state, meta_format.PREFIX) for key, state in (encoders | checkpoint.encoders).items()
    }
    if checkpoint.predictor is not None:
        contents["predictor"] = _prefixed(checkpoint.predictor, meta_format.PREFIX)
    elif checkpoint.action_predictor is not None:
        contents["predictor"] = _prefixed(checkpoint.action_predictor, "module.")
    if checkpoint.classifiers:
        contents["classifiers"] = [_prefixed(state, "module.") for state in checkpoint.classifiers]
    own = _own(checkpoint, cfg, weights, heads)
    config = {name: own.pop(name) for name in ("model", "data")}
    return contents | {"epoch": 0, "vjepa_fast": {"config": config, **own}}


def to_fast(
    checkpoint: Checkpoint, cfg: ModelConfig, weights: str, heads: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of our .safetensors file: encoder.*, predictor.*, action_predictor.*, classifiers.<i>.*."""
    state = _prefixed(checkpoint.encoders[weights], "encoder.")
    state |= _prefixed(checkpoint.predictor or {}, "predictor.")
    state |= _prefixed(checkpoint.action_predictor or {}, "action_predictor.")
    for number, classifier in enumerate(checkpoint.classifiers):
        state |= _prefixed(classifier, f"classifiers.{number}.")
    return state, {"format": "pt", METADATA_KEY: json.dumps(_own(checkpoint, cfg, weights, heads))}


def _own(checkpoint: Checkpoint, cfg: ModelConfig, weights: str, heads: int | None) -> dict[str, Any]:
    return {
        "version": vjepa_fast.__version__,
        "weights": weights,
        "model": cfg.model_dump(mode="json"),
        "data": {key: value for key, value in checkpoint.data.items() if key in _KEPT_DATA},
        "num_classifiers": len(checkpoint.classifiers),
        "labels": checkpoint.labels,
        "probe_heads": probe_heads(checkpoint, heads) if checkpoint.classifiers else None,
    }


def to_hf_files(
    checkpoint: Checkpoint, cfg: ModelConfig, weights: str, probe: int = 0, heads: int | None = None
) -> dict[str, Any]:
    """Names and contents of the files of a Hugging Face folder.

    Raises:
        UserError: transformers has no such model.
    """
    encoder, predictor = checkpoint.encoders[weights], checkpoint.predictor
    num_layers = num_labels = None
    if checkpoint.classifiers:
        classifier = checkpoint.classifiers[probe]
        num_layers, num_labels = infer_config.num_blocks(classifier, "pooler.blocks"), len(classifier["linear.bias"])
    config = to_hf_config(cfg, num_layers, checkpoint.labels, num_labels, predictor is not None)
    state = huggingface.to_hf(encoder, predictor) if predictor is not None else huggingface.encoder_to_hf(encoder)
    if checkpoint.classifiers:
        if probe_heads(checkpoint, heads) != config["num_attention_heads"]:
            raise UserError(
                f"Hugging Face's VJEPA2ForVideoClassification gives a probe the encoder's "
                f"{config['num_attention_heads']} heads, but this one has {probe_heads(checkpoint, heads)}; if it was "
                f"trained with {config['num_attention_heads']}, say --probe-heads {config['num_attention_heads']}"
            )
        state = {f"vjepa2.{key}": value for key, value in state.items()} | classifier_to_hf(classifier)
    kind = str(encoder["norm.weight"].dtype).removeprefix("torch.")
    crop = config["crop_size"]
    processor = {
        "video_processor_type": "VJEPA2VideoProcessor",
        "crop_size": {"height": crop, "width": crop},
        # The reference's evaluations: short side crop * 256 / 224, then the middle.
        "size": {"shortest_edge": int(crop * 256 / 224)},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
    }
    return {"config.json": config | {"torch_dtype": kind}, WEIGHTS_FILE: state, _PROCESSOR_FILE: processor}


def _prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def _save(state: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """safetensors wants memory of their own and without gaps for all tensors."""
    seen: set[int] = set()
    whole = {}
    for key, value in state.items():
        pointer = value.untyped_storage().data_ptr()
        whole[key] = value.clone() if pointer in seen else value.contiguous()
        seen.add(pointer)
    # save_file creates mode 0600; touch first to learn the mode that the umask allows.
    path.touch()
    mode = path.stat().st_mode
    save_file(whole, path, metadata)
    path.chmod(mode)


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it at the end of the block and deleted if that raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
