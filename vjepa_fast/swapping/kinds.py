"""Recognises the modules that `swap` supports by class and attribute names, without importing their packages."""

from __future__ import annotations

from torch import nn

from vjepa_fast.swapping import huggingface as swap_hf
from vjepa_fast.swapping import meta as swap_meta
from vjepa_fast.swapping import meta_predictor, meta_v21
from vjepa_fast.swapping.shared_parameters import Fast, class_of

Part = tuple[nn.Module, str, type[Fast]]
"""A module to change, what it is, `encoder` or `predictor`, and the class to put before its own."""

_ENCODER = ("blocks", "patch_embed", "tubelet_size", "is_video", "out_layers")
_PREDICTOR = ("predictor_blocks", "predictor_embed", "predictor_proj", "mask_tokens", "tubelet_size")
_V1, _V2 = ("input_size",), ("img_height", "use_rope")
_HF = ("embeddings", "layer", "layernorm", "config")

_NETWORKS: list[tuple[str, tuple[str, ...], str, type[Fast]]] = [
    ("VisionTransformer", (*_ENCODER, *_V1, "norm"), "encoder", swap_meta.FastEncoder),
    ("VisionTransformer", (*_ENCODER, *_V2, "norm"), "encoder", swap_meta.FastEncoder),
    ("VisionTransformer", (*_ENCODER, *_V2, "norms_block", "hierarchical_layers"), "encoder", meta_v21.FastEncoderV21),
    ("VisionTransformerPredictor", (*_PREDICTOR, *_V1), "predictor", meta_predictor.FastPredictorV1),
    ("VisionTransformerPredictor", (*_PREDICTOR, *_V2, "hierarchical_layers"), "predictor", meta_v21.FastPredictorV21),
    ("VisionTransformerPredictor", (*_PREDICTOR, *_V2), "predictor", meta_predictor.FastPredictor),
    ("VJEPA2Encoder", _HF, "encoder", swap_hf.FastHFEncoder),
    ("VJEPA2Predictor", (*_HF, "proj"), "predictor", swap_hf.FastHFPredictor),
]
"""Name of a class, attributes that it must have, what it is, and the class to put before it; the first that fits."""

_WRAPPERS: list[tuple[str, type[Fast], type[Fast]]] = [
    ("MultiMaskWrapper", swap_meta.FastEncoder, swap_meta.FastMultiMask),
    ("MultiSeqWrapper", swap_meta.FastEncoder, swap_meta.FastMultiSeq),
    ("MultiSeqWrapper", meta_v21.FastEncoderV21, meta_v21.FastMultiSeqV21),
    ("PredictorMultiMaskWrapper", meta_predictor.FastPredictorV1, meta_predictor.FastPredictorMultiMask),
    ("PredictorMultiSeqWrapper", meta_predictor.FastPredictor, meta_predictor.FastPredictorMultiSeq),
    ("PredictorMultiSeqWrapper", meta_v21.FastPredictorV21, meta_v21.FastPredictorMultiSeqV21),
]
"""Name of a class, what its backbone becomes, and the class to put before it."""

_MODELS = ("VJEPA2Model", "VJEPA2ForVideoClassification")
"""Hugging Face's that stay what they are while parts of them change."""


def parts(module: nn.Module) -> list[Part]:
    """What has to change in a module, inner parts first; nothing where it is not known."""
    name = class_of(module).__name__
    if name in _MODELS and hasattr(module, "config"):
        return [(part, "encoder", mixin) for child in module.children() for part, _, mixin in parts(child)]
    backbone = getattr(module, "backbone", None)
    if isinstance(backbone, nn.Module):
        inner = parts(backbone)
        for wrapper, of, mixin in _WRAPPERS:
            if inner and name == wrapper and inner[-1][2] is of:
                return [*inner, (module, inner[-1][1], mixin)]
    for network, attributes, role, mixin in _NETWORKS:
        if name == network and all(hasattr(module, attribute) for attribute in attributes):
            return [(module, role, mixin)]
    return []
