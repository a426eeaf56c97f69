"""From a checkpoint to a model for use: its config, what was assumed, and whether the weights fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.checkpoints import infer_config
from vjepa_fast.checkpoints.open import Checkpoint, open_checkpoint
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config import load_config
from vjepa_fast.config.schema import Dtype, ModelConfig
from vjepa_fast.inference.model import CheckpointWarning, InferenceModel
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import COMPUTE_DTYPES, VisionTransformer


def load(
    path: str | Path,
    *,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype = "float32",
    predictor: bool = True,
    config: str | Path | None = None,
    **overrides: Any,
) -> InferenceModel:
    """A pretrained model out of any file or folder that vjepa_fast.checkpoints.open.open_checkpoint reads.

    The encoder that is not chosen, the optimizer and everything else stay in the file.

    Args:
        path: a checkpoint of facebookresearch/jepa or vjepa2 or of ours, a run folder, a .safetensors file, a Hugging
            Face folder.
        weights: `target_encoder` (or `ema_encoder`), the teacher, or `encoder`, the student. None: the teacher where
            the file has one, as the reference's evaluations do; its torch.hub loads the student. Of a run on pixels
            (model.objective=pixels), which has no teacher, None is the student.
        device: where the parameters go.
        dtype: float32, bfloat16 or float16: of the parameters and of the computation.
        predictor: False leaves it in the file.
        config: the YAML file that the model was trained with, Meta's or ours; it comes before what the file says.
        overrides: fields of ModelConfig, for what shapes do not tell and the file does not say: num_heads=12,
            pred_num_heads=12, crop_size=384, rope_style="interleaved".

    Raises:
        UserError: the file cannot be read, wants to run code, or does not fit; the message says what does not, and
            what config would fit.
        ConfigError: a field that does not exist, weights that the file does not have, or a GPU that is not there.
    """
    checkpoint = open_checkpoint(path)
    if config is not None:
        checkpoint = with_config(checkpoint, config)
    model = build(checkpoint, weights=weights, device=device, dtype=dtype, predictor=predictor, overrides=overrides)
    if model.assumed:
        warnings.warn(f"{checkpoint.path}: " + "; ".join(model.assumed), CheckpointWarning, stacklevel=2)
    return model


def build(
    checkpoint: Checkpoint,
    *,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype = "float32",
    predictor: bool = True,
    overrides: dict[str, Any] | None = None,
) -> InferenceModel:
    """The model of an opened checkpoint; arguments and errors as `load`."""
    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected {', '.join(COMPUTE_DTYPES)}")
    if not predictor:
        checkpoint = replace(checkpoint, predictor=None)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {str(device)!r}, but torch finds no usable GPU (torch.cuda.is_available() is "
            "false); expected 'cpu'"
        )
    key = checkpoint.choose(weights)
    cfg, assumed = model_config(checkpoint, key, overrides or {}, dtype)
    modules = check_fit(checkpoint, key, cfg)
    states = {key: checkpoint.encoders[key], "predictor": checkpoint.predictor}
    for name, module in modules.items():
        state = states[name]
        assert state is not None
        module.to(COMPUTE_DTYPES[dtype]).to_empty(device=device)
        module.load_state_dict(_read(module, state))
    encoder, loaded = modules[key], modules.get("predictor")
    assert isinstance(encoder, VisionTransformer) and (loaded is None or isinstance(loaded, Predictor))
    return InferenceModel(encoder, loaded, checkpoint.data, key, assumed)


def with_config(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """The checkpoint with what a YAML file says of its model and data.

    Raises:
        ConfigError: the file cannot be read or is not accepted.
    """
    config = load_config(path).model_dump(mode="json")
    return replace(checkpoint, model=config["model"], data=config["data"])


def model_config(
    checkpoint: Checkpoint, weights: str, overrides: dict[str, Any], dtype: Dtype = "float32"
) -> tuple[ModelConfig, list[str]]:
    """The config of the model of an opened checkpoint, and a sentence for everything that was assumed.

    Args:
        checkpoint: from open_checkpoint.
        weights: key of the encoder.
        overrides: as `load`.
        dtype: of the computation.

    Raises:
        ConfigError: a field that does not exist or does not fit.
    """
    unknown = [name for name in overrides if name not in ModelConfig.model_fields]
    if unknown:
        near = get_close_matches(unknown[0], ModelConfig.model_fields, n=1, cutoff=0.5)
        raise ConfigError(
            f"{unknown[0]} is not a field of the model's config"
            + (f"; did you mean {near[0]}?" if near else ", as num_heads, pred_num_heads, crop_size or rope_style are")
        )
    # What training alone uses has no place here.
    fixed = {"dtype": dtype, "compile_model": False, "target_precision": "same"}
    cfg, assumed = infer_config.guess(
        checkpoint.encoders[weights],
        checkpoint.predictor,
        checkpoint.model | fixed,
        overrides,
        f"{weights} of {checkpoint.path}",
    )
    if checkpoint.action_predictor is not None:
        assumed.append(
            "the file holds an action-conditioned predictor, which cannot be run yet: the encoder is loaded alone"
        )
    return cfg, assumed


def check_fit(checkpoint: Checkpoint, weights: str, cfg: ModelConfig) -> dict[str, nn.Module]:
    """The modules of a config on the meta device, by their key in the checkpoint, whose weights fit them.

    Raises:
        UserError: they do not; the message says where, and what config would fit.
    """
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {weights: VisionTransformer(cfg)}
        if checkpoint.predictor is not None:
            modules["predictor"] = Predictor(cfg)
    for name, module in modules.items():
        state = checkpoint.predictor if name == "predictor" else checkpoint.encoders[name]
        assert state is not None
        if differences := infer_config.differences(module.state_dict(), _read(module, state)):
            fits = infer_config.fitting(checkpoint.encoders[weights], checkpoint.predictor)
            raise UserError(
                f"the {name} in checkpoint {checkpoint.path} does not fit the model: {differences}"
                + (f". A config that fits it has {fits}" if fits else "")
            )
    return modules


def _read(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the tables that nothing reads."""
    own = module.state_dict()
    return {key: value for key, value in state.items() if key in own or key not in infer_config.UNREAD_TABLES}
