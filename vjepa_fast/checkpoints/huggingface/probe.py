"""Renames the parameters of attentive probes to and from Hugging Face's VJEPA2ForVideoClassification.

A probe of V-JEPA 2 is three self-attention blocks, one cross-attention block with a learned query, and a linear layer.
Query, key and value are one layer here and three there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vjepa_fast.common.errors import UserError

_PROBE = {"linear": "classifier", "pooler.query_tokens": "pooler.query_tokens"}
_PROBE_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROBE_CROSS = {
    "norm1": "layer_norm1",
    "xattn.q": "cross_attn.q_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_CROSS, _CROSS_HF = "pooler.cross_attention_block.", "pooler.cross_attention_layer."
_SELF, _SELF_HF = "pooler.blocks.", "pooler.self_attention_layers."


def classifier_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An attentive probe, under the names that VJEPA2ForVideoClassification has for pooler and classifier.

    Args:
        state: state_dict of the reference's AttentiveClassifier (src/models/attentive_pooler.py).

    Raises:
        UserError: a parameter without a counterpart, such as the output projection in probes of V-JEPA 1.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        inner = layer.removeprefix(_CROSS)
        block = re.fullmatch(rf"{re.escape(_SELF)}(\d+)\.(.+)", layer)
        if key in _PROBE:
            result[_PROBE[key]] = value
        elif layer in _PROBE:
            result[f"{_PROBE[layer]}.{kind}"] = value
        elif layer.startswith(_CROSS) and inner == "xattn.kv":
            for name, half in zip(("k_proj", "v_proj"), value.chunk(2), strict=True):
                result[f"{_CROSS_HF}cross_attn.{name}.{kind}"] = half.clone()
        elif layer.startswith(_CROSS) and inner in _PROBE_CROSS:
            result[f"{_CROSS_HF}{_PROBE_CROSS[inner]}.{kind}"] = value
        elif block and block[2] == "attn.qkv":
            for name, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                result[f"{_SELF_HF}{block[1]}.self_attn.{name}.{kind}"] = third.clone()
        elif block and block[2] in _PROBE_BLOCK:
            result[f"{_SELF_HF}{block[1]}.{_PROBE_BLOCK[block[2]]}.{kind}"] = value
        else:
            raise UserError(
                f"parameter {key!r} of an attentive probe has no place in VJEPA2ForVideoClassification; "
                "expected a probe as V-JEPA 2 trains them"
            )
    return result


def classifier_from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of classifier_to_hf.

    Raises:
        UserError: an unknown key, or part of a projection is missing.
    """
    cross = {theirs: ours for ours, theirs in _PROBE_CROSS.items()}
    blocks = {theirs: ours for ours, theirs in _PROBE_BLOCK.items()}
    outer = {theirs: ours for ours, theirs in _PROBE.items()}
    result: dict[str, Tensor] = {}

    def join(prefix: str, names: tuple[str, ...], kind: str) -> Tensor:
        missing = [name for name in names if f"{prefix}{name}.{kind}" not in state]
        if missing:
            raise UserError(f"the Hugging Face state has no {prefix}{missing[0]}.{kind}")
        return torch.cat([state[f"{prefix}{name}.{kind}"] for name in names])

    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        inner = layer.removeprefix(_CROSS_HF)
        block = re.fullmatch(rf"{re.escape(_SELF_HF)}(\d+)\.(.+)", layer)
        if key in outer:
            result[outer[key]] = value
        elif layer in outer:
            result[f"{outer[layer]}.{kind}"] = value
        elif layer.startswith(_CROSS_HF) and inner in ("cross_attn.k_proj", "cross_attn.v_proj"):
            result[f"{_CROSS}xattn.kv.{kind}"] = join(f"{_CROSS_HF}cross_attn.", ("k_proj", "v_proj"), kind)
        elif layer.startswith(_CROSS_HF) and inner in cross:
            result[f"{_CROSS}{cross[inner]}.{kind}"] = value
        elif block and block[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            prefix = f"{_SELF_HF}{block[1]}.self_attn."
            result[f"{_SELF}{block[1]}.attn.qkv.{kind}"] = join(prefix, ("q_proj", "k_proj", "v_proj"), kind)
        elif block and block[2] in blocks:
            result[f"{_SELF}{block[1]}.{blocks[block[2]]}.{kind}"] = value
        else:
            raise UserError(
                f"unexpected key {key!r} in a Hugging Face state; expected those of VJEPA2ForVideoClassification"
            )
    return result
