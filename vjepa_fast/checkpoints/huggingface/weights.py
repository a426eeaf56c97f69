"""Renames the parameters of a V-JEPA 2 encoder and predictor to and from Hugging Face transformers.

The counterpart is `transformers.VJEPA2Model`. Only names and layouts differ: query, key and value are one layer here
and three there, mask tokens are separate parameters here and one stacked tensor there. It has RoPE in the tiled form
and GELU only, so models with sine-cosine tables, SwiGLU or an image patch embedding have no counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError

# Ours -> theirs, within the encoder and within the predictor. `blocks.<i>` and `predictor_blocks.<i>` come separately.
ENCODER = {"patch_embed.proj": "embeddings.patch_embeddings.proj", "norm": "layernorm"}
PREDICTOR = {
    "predictor_embed": "embeddings.predictor_embeddings",
    "predictor_norm": "layernorm",
    "predictor_proj": "proj",
}
_MASK_TOKENS = "embeddings.mask_tokens"
BLOCK = {"norm1": "norm1", "attn.proj": "attention.proj", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
QKV = ("query", "key", "value")


def to_hf(encoder_state: Mapping[str, Tensor], predictor_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a VJEPA2Model.

    Args:
        encoder_state: state_dict of an encoder (the context encoder or the target encoder).
        predictor_state: state_dict of the predictor.

    Returns:
        Keys `encoder.*` and `predictor.*` for a strict load into VJEPA2Model; qkv and mask tokens are copies, the other
        tensors are shared with the arguments.

    Raises:
        UserError: a parameter that VJEPA2Model has no place for.
    """
    state = encoder_to_hf(encoder_state)
    tokens = {key: value for key, value in predictor_state.items() if key.startswith("mask_tokens.")}
    rest = {key: value for key, value in predictor_state.items() if key not in tokens}
    state |= {f"predictor.{key}": value for key, value in _part_to_hf(rest, "predictor_blocks", PREDICTOR).items()}
    state[f"predictor.{_MASK_TOKENS}"] = torch.stack([tokens[f"mask_tokens.{i}"] for i in range(len(tokens))])
    return state


def encoder_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of to_hf that has no predictor: keys `encoder.*`."""
    return {f"encoder.{key}": value for key, value in _part_to_hf(state, "blocks", ENCODER).items()}


def from_hf(hf_state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of to_hf.

    Args:
        hf_state: state_dict of a VJEPA2Model.

    Returns:
        (encoder_state, predictor_state), for strict loads into models with as many mask tokens; the second is empty
        where there is no predictor at all.

    Raises:
        UserError: a key that VJEPA2Model does not have, or mask tokens, queries, keys or values that are missing.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "predictor": {}}
    for key, value in hf_state.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise UserError(
                f"unexpected key {key!r} in a Hugging Face state; expected the keys of VJEPA2Model, "
                "which begin with encoder. or predictor."
            )
        parts[part][name] = value
    encoder, predictor = parts["encoder"], parts["predictor"]
    if not predictor:
        return _part_from_hf(encoder, "encoder", "blocks", ENCODER), {}
    if _MASK_TOKENS not in predictor:
        raise UserError(f"the Hugging Face state has no predictor.{_MASK_TOKENS}; expected a whole VJEPA2Model")
    tokens = {f"mask_tokens.{i}": token.clone() for i, token in enumerate(predictor.pop(_MASK_TOKENS))}
    return (
        _part_from_hf(encoder, "encoder", "blocks", ENCODER),
        tokens | _part_from_hf(predictor, "predictor", "predictor_blocks", PREDICTOR),
    )


def _part_to_hf(state: Mapping[str, Tensor], blocks: str, names: dict[str, str]) -> dict[str, Tensor]:
    block = re.compile(rf"{blocks}\.(\d+)\.(.+)")
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        match = block.fullmatch(layer)
        if match is None:
            target = names.get(layer)
        elif match[2] == "attn.qkv":
            for name, third in zip(QKV, value.chunk(3), strict=True):
                result[f"layer.{match[1]}.attention.{name}.{kind}"] = third.clone()
            continue
        else:
            inner = BLOCK.get(match[2])
            target = inner and f"layer.{match[1]}.{inner}"
        # An image model's patch embedding bears the same name but is a 2-D convolution.
        if target is None or (layer == "patch_embed.proj" and value.ndim == 4):
            raise UserError(
                f"parameter {key!r} of shape {list(value.shape)} has no place in VJEPA2Model; "
                "expected a video model with RoPE and GELU"
            )
        result[f"{target}.{kind}"] = value
    return result


def _part_from_hf(state: Mapping[str, Tensor], part: str, blocks: str, names: dict[str, str]) -> dict[str, Tensor]:
    outer = {theirs: ours for ours, theirs in names.items()}
    inner = {theirs: ours for ours, theirs in BLOCK.items()}
    block = re.compile(r"layer\.(\d+)\.(.+)")
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        match = block.fullmatch(layer)
        name = match[2].removeprefix("attention.") if match else ""
        if match is None:
            target = outer.get(layer)
        elif name in QKV:
            prefix = f"layer.{match[1]}.attention"
            missing = [one for one in QKV if f"{prefix}.{one}.{kind}" not in state]
            if missing:
                raise UserError(f"the Hugging Face state has no {part}.{prefix}.{missing[0]}.{kind}")
            if name == "query":
                joined = torch.cat([state[f"{prefix}.{one}.{kind}"] for one in QKV])
                result[f"{blocks}.{match[1]}.attn.qkv.{kind}"] = joined
            continue
        else:
            target = f"{blocks}.{match[1]}.{inner[match[2]]}" if match[2] in inner else None
        if target is None:
            raise UserError(f"unexpected key '{part}.{key}' in a Hugging Face state; expected those of VJEPA2Model")
        result[f"{target}.{kind}"] = value
    return result
