"""Opens any file or folder with V-JEPA weights and describes its contents.

Read are: training checkpoints of facebookresearch/jepa and vjepa2 and ours (app/vjepa/train.py:331-345), released
weights, action-conditioned checkpoints (app/vjepa_droid), attentive probes (evals/video_classification_frozen), bare
state dicts, run folders, our folders of shards, our .safetensors files, and folders or files of Hugging Face
transformers. Keys lose the prefixes of data parallelism, wrappers and compilation. Nothing that a file holds is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vjepa_fast.checkpoints import meta_format, sharded_format
from vjepa_fast.checkpoints.huggingface import weights as huggingface
from vjepa_fast.checkpoints.huggingface.config import from_hf_config
from vjepa_fast.checkpoints.huggingface.probe import classifier_from_hf
from vjepa_fast.checkpoints.run_folder import LATEST, LATEST_OF_V1, SHARDS, newest_checkpoint, previous_checkpoints
from vjepa_fast.common.errors import ConfigError, UserError

State = dict[str, Tensor]
Layout = Literal["meta", "hf", "fast"]

ENCODERS = ("target_encoder", "ema_encoder", "encoder")
"""Keys under which files keep encoders, the one that is taken by default first. V-JEPA 2.1 calls the target encoder of
its distilled models ema_encoder."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA_KEY = "vjepa_fast"


@dataclass
class Checkpoint:
    """What a file holds. Tensors may still lie in the file: they are read when they are touched."""

    path: Path
    layout: Layout
    encoders: dict[str, State]
    """By their key in the file."""
    predictor: State | None = None
    action_predictor: State | None = None
    """The predictor of an action-conditioned checkpoint; nothing here runs it."""
    classifiers: list[State] = field(default_factory=list)
    """Attentive probes."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that the file names."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fields of DataConfig that the file names."""
    labels: dict[str, Any] = field(default_factory=dict)
    """`id2label` of a classifier."""
    probe_heads: int | None = None
    """Heads of the attentive probes, where the file names them."""

    def choose(self, weights: str | None = None) -> str:
        """The key of the encoder that is meant.

        Args:
            weights: `encoder` (the student), `target_encoder` or `ema_encoder` (the teacher); None: the teacher, else
                what there is; of a run on pixels the student, as its moving average taught nothing.

        Raises:
            ConfigError: no such key in the file.
            UserError: it holds no encoder at all.
        """
        if not self.encoders:
            held = "attentive probes" if self.classifiers else "a predictor"
            raise UserError(
                f"checkpoint {self.path} holds {held} but no encoder; give the file of the encoder that belongs to it"
            )
        if weights is None:
            if self.model.get("objective") == "pixels" and "encoder" in self.encoders:
                return "encoder"
            return next(key for key in ENCODERS if key in self.encoders)
        if weights not in self.encoders:
            raise ConfigError(f"checkpoint {self.path} has no {weights}; it has {', '.join(self.encoders)}")
        return weights


def open_checkpoint(path: str | Path) -> Checkpoint:
    """What a file or folder holds.

    Args:
        path: see the module docstring for what is known. Of a run folder, latest.pt is read or the newest step<N>.dcp,
            or the <write_tag>-latest.pth.tar of V-JEPA 1.

    Raises:
        UserError: it does not exist, cannot be read, wants to run code, or holds nothing of V-JEPA.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pickle(path)


def _open_folder(path: Path) -> Checkpoint:
    if (path / "config.json").exists():
        return _open_hf(path)
    if sharded_format.is_dcp(path):
        return _open_shards(path)
    newest = newest_checkpoint(path)
    if newest is not None:
        return _open_shards(newest) if newest.is_dir() else _open_pickle(newest)
    if (path / WEIGHTS_FILE).exists():
        return _open_safetensors(path / WEIGHTS_FILE)
    of_v1 = sorted(path.glob(f"*{LATEST_OF_V1}"))
    if len(of_v1) > 1:
        raise UserError(
            f"folder {path} holds several runs: {', '.join(file.name for file in of_v1)}; name one of the files"
        )
    if of_v1:
        return _open_pickle(of_v1[0])
    raise UserError(
        f"folder {path} holds no checkpoint: expected {LATEST} or step<N>{SHARDS} (a run), "
        f"*{LATEST_OF_V1} (a run of V-JEPA 1), {WEIGHTS_FILE}, or config.json beside the weights (Hugging "
        "Face); give the file itself if it has another name"
    )


def _open_shards(path: Path) -> Checkpoint:
    if wrong := sharded_format.damage(path):
        others = [other for _, other in previous_checkpoints(path.parent) if other != path and other.is_dir()]
        whole = next((other for other in others if sharded_format.damage(other) is None), None)
        raise UserError(
            f"checkpoint {path} cannot be read: {wrong}"
            + (f"; the newest whole one beside it is {whole}" if whole is not None else "")
        )
    # Without the optimizer's state, which is most of it.
    return _sort(path, sharded_format.Folder(path).contents(lambda name: not name.startswith("opt.")))


def _open_pickle(path: Path) -> Checkpoint:
    return _sort(path, meta_format.read(path, mmap=True))


def _sort(path: Path, contents: dict[str, Any]) -> Checkpoint:
    """What a dictionary in one of the reference's layouts holds."""
    found = Checkpoint(path, "meta", {})
    for key in ENCODERS:
        if _is_state(contents.get(key)):
            found.encoders[key] = meta_format.strip_prefixes(contents[key])
    if _is_state(contents.get("predictor")):
        _set_predictor(found, meta_format.strip_prefixes(contents["predictor"]))
    # V-JEPA 1 trains one probe (`classifier`), V-JEPA 2 several.
    probes = contents.get("classifiers", contents.get("classifier"))
    if probes is not None:
        probes = probes if isinstance(probes, list) else [probes]
        if not all(map(_is_state, probes)):
            raise UserError(f"checkpoint {path}: its classifiers are not state dicts")
        found.classifiers = [meta_format.strip_prefixes(probe) for probe in probes]
    own = contents.get("vjepa_fast")
    if isinstance(own, dict) and isinstance(own.get("config"), dict):
        found.model, found.data = _section(own["config"], "model"), _section(own["config"], "data")
        found.labels, found.probe_heads = own.get("labels") or {}, own.get("probe_heads")
    if _is_state(contents):
        _split_bare(found, contents)
    if not (found.encoders or found.predictor or found.action_predictor or found.classifiers):
        raise UserError(
            f"checkpoint {path} holds nothing of V-JEPA: expected an encoder, target_encoder, ema_encoder, "
            f"predictor or classifiers, or a state dict; it has {meta_format.shorten(map(str, contents))}"
        )
    return found


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return dict(section) if isinstance(section, dict) else {}


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _set_predictor(found: Checkpoint, state: State) -> None:
    if "action_encoder.weight" in state:
        found.action_predictor = state
    else:
        found.predictor = state


def _split_bare(found: Checkpoint, contents: Mapping[str, Any]) -> None:
    """Sort the entries of a state dict that is not under any key."""
    state = meta_format.strip_prefixes(dict(contents))
    if any(key.startswith("encoder.layer.") for key in (key.removeprefix("vjepa2.") for key in state)):
        _set_hf(found, state)
        return
    parts: dict[str, State] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head in (*ENCODERS, "predictor") and rest:
            parts.setdefault(head, {})[rest] = value
        elif head in ("pooler", "linear"):
            parts.setdefault("classifier", {})[key] = value
        elif head.startswith(("predictor_", "mask_tokens", "action_encoder", "state_encoder", "extrinsics_encoder")):
            parts.setdefault("predictor", {})[key] = value
        else:
            parts.setdefault("encoder", {})[key] = value
    predictor, classifier = parts.pop("predictor", None), parts.pop("classifier", None)
    if predictor is not None:
        _set_predictor(found, predictor)
    if classifier is not None:
        found.classifiers = [classifier]
    if "patch_embed.proj.weight" in next(iter(parts.values()), {}):
        found.encoders = parts


def _open_safetensors(path: Path) -> Checkpoint:
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    state, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        if (path.parent / "config.json").exists():
            return _open_hf(path.parent)
        found = Checkpoint(path, "hf", {})
        _split_bare(found, state)
        if not (found.encoders or found.predictor or found.classifiers):
            raise UserError(f"checkpoint {path} holds nothing of V-JEPA; it has {meta_format.shorten(state)}")
        return found
    try:
        own = json.loads(metadata[METADATA_KEY])
        found = Checkpoint(
            path, "fast", {}, model=own["model"], data=own["data"], labels=own["labels"], probe_heads=own["probe_heads"]
        )
        key, num_probes = str(own["weights"]), int(own["num_classifiers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: its metadata is damaged ({error!r})") from error
    if encoder := _below(state, "encoder."):
        found.encoders[key] = encoder
    found.predictor = _below(state, "predictor.") or None
    found.action_predictor = _below(state, "action_predictor.") or None
    found.classifiers = [_below(state, f"classifiers.{number}.") for number in range(num_probes)]
    return found


def _below(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """The tensors of a .safetensors file, and its metadata.

    Raises:
        UserError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} cannot be read: it is truncated, damaged or no safetensors file") from error


def _open_hf(folder: Path) -> Checkpoint:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "vjepa2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{folder / 'config.json'} is of a model of type {kind!r}; expected 'vjepa2'")
    names = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / INDEX_FILE} is damaged ({error!r})") from error
    state: State = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"folder {folder} has config.json but no {name}")
        state |= read_safetensors(folder / name)[0]
    found = Checkpoint(folder, "hf", {}, model=from_hf_config(config), labels=config.get("id2label") or {})
    _set_hf(found, state)
    return found


def _set_hf(found: Checkpoint, state: State) -> None:
    found.layout = "hf"
    if any(key.startswith("vjepa2.") for key in state):
        found.classifiers = [
            classifier_from_hf({key: value for key, value in state.items() if not key.startswith("vjepa2.")})
        ]
        found.probe_heads = found.model.get("num_heads")
        state = _below(state, "vjepa2.")
    encoder, predictor = huggingface.from_hf(state)
    found.encoders = {"encoder": encoder}
    found.predictor = predictor or None
