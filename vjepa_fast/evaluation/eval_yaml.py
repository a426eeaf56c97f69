"""Converts Meta's YAML files of video classification to options of `vjepa-fast probe`.

Files of V-JEPA 2 have everything below `experiment`, those of V-JEPA 1 have `data`, `optimization` and `pretrain`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import yaml_io
from vjepa_fast.evaluation.attentive_probe import HeadSetting

_V1_FINAL_DECAY = 1e-6
"""Of the weight decay in V-JEPA 1's evaluations, whatever their files say (evals/.../eval.py, init_opt)."""


@dataclass
class EvalYaml:
    """What a file says.

    Attributes:
        options: values of options of the command, by their names in Python.
        heads: the grid.
        notes: a sentence for everything that is done in another way.
    """

    options: dict[str, Any]
    heads: list[HeadSetting]
    notes: list[str] = field(default_factory=list)


def read_eval_yaml(path: Path) -> EvalYaml:
    """The settings of one file.

    Raises:
        ConfigError: it is none, or asks for something that is not there.
    """
    content = yaml_io.read(path)
    name = content.get("eval_name")
    if name not in (None, "video_classification_frozen"):
        raise ConfigError(f"{path} is of {name}; expected an evaluation of video_classification_frozen")
    if not {"experiment", "pretrain"} & content.keys():
        raise ConfigError(
            f"{path} has neither experiment (V-JEPA 2) nor pretrain (V-JEPA 1); expected a file of "
            "Meta's configs/eval or configs/evals"
        )
    source = _Source(path, content)
    found = _read_v2(source) if "experiment" in content else _read_v1(source)
    gpus = source.number("nodes", 1) * source.number("tasks_per_node", 1)
    per_gpu = found.options["batch_size"]
    found.options["batch_size"] = per_gpu * gpus
    if gpus > 1:
        found.notes.append(f"{path}: {per_gpu} videos on each of {gpus} GPUs are a step of {per_gpu * gpus} here")
    epochs = found.options["epochs"]
    found.notes.append(
        f"{path}: the reference augments every video again in each of the {epochs} epochs, which "
        f"--augmented {epochs} does here; without --augmented the plain clips are seen"
    )
    return found


class _Source:
    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content

    def get(self, key: str, default: Any = None) -> Any:
        """By a dotted key; null is absent."""
        value: Any = self._content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def number(self, key: str, default: Any = None, kind: type = int) -> Any:
        value = self.get(key, default)
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not fits or value < 0 or (kind is int and value < 1):
            raise ConfigError(
                f"{self._path}: {key} is {value!r}; expected a "
                f"{'positive whole number' if kind is int else 'number of at least 0'}"
            )
        return value

    def refuse(self, key: str, what: str) -> None:
        if self.get(key, False):
            raise ConfigError(f"{self._path}: {key} ({what}) is not supported; take it out")

    def head(self, prefix: str, final_decay: float | None = None) -> HeadSetting:
        lr, decay = (self.number(f"{prefix}.{key}", kind=float) for key in ("lr", "weight_decay"))
        return HeadSetting(
            lr,
            decay,
            self.number(f"{prefix}.start_lr", lr, float),
            self.number(f"{prefix}.final_lr", 0.0, float),
            self.number(f"{prefix}.final_weight_decay", decay, float) if final_decay is None else final_decay,
            self.number(f"{prefix}.warmup", 0.0, float),
        )

    def clips(self, prefix: str) -> dict[str, Any]:
        return {
            "frames": self.number(f"{prefix}.frames_per_clip", 16),
            "segments": self.number(f"{prefix}.num_segments", 1),
            "views": self.number(f"{prefix}.num_views_per_segment", 1),
        }

    def each(self, key: str) -> list[_Source]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            raise ConfigError(f"{self._path}: {key} is missing; expected a list of learning rates and weight decays")
        return [_Source(self._path, {"multihead_kwargs": one}) for one in value]


def _read_v2(source: _Source) -> EvalYaml:
    for key, what in (
        ("experiment.data.clip_duration", "clips of a length in seconds"),
        ("model_kwargs.wrapper_kwargs.use_pos_embed", "positions of segments"),
    ):
        source.refuse(key, what)
    heads = [one.head("multihead_kwargs") for one in source.each("experiment.optimization.multihead_kwargs")]
    options = source.clips("experiment.data") | {
        "frame_step": source.number("experiment.data.frame_step", 4),
        "size": source.number("experiment.data.resolution", 224),
        "depth": source.number("experiment.classifier.num_probe_blocks", 1),
        "probe_heads": source.number("experiment.classifier.num_heads", 16),
        "epochs": source.number("experiment.optimization.num_epochs"),
        "batch_size": source.number("experiment.optimization.batch_size"),
        "style": "vjepa2",
    }
    if layers := source.get("model_kwargs.wrapper_kwargs.out_layers"):
        options["out_layers"] = ",".join(map(str, layers))
    if key := source.get("model_kwargs.pretrain_kwargs.encoder.checkpoint_key"):
        options["weights"] = key
    return EvalYaml(options, heads)


def _read_v1(source: _Source) -> EvalYaml:
    source.refuse("pretrain.clip_duration", "clips of a length in seconds")
    options = source.clips("data") | {
        # Not that of `data`, which its files have and it does not read.
        "frame_step": source.number("pretrain.frame_step", 4),
        "size": source.number("optimization.resolution", 224),
        "depth": 1,
        "epochs": source.number("optimization.num_epochs"),
        "batch_size": source.number("optimization.batch_size"),
        "style": "vjepa1",
    }
    if options["segments"] > 1 and not source.get("optimization.attend_across_segments", False):
        raise ConfigError(
            "optimization.attend_across_segments: false (segments one by one) is not supported; set it "
            "to true, or data.num_segments to 1"
        )
    if key := source.get("pretrain.checkpoint_key"):
        options["weights"] = key
    return EvalYaml(options, [source.head("optimization", _V1_FINAL_DECAY)])
