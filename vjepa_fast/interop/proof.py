"""Runs a converted model here and in the other library, on the same random clip, and compares.

Legend: B clips, N tokens, K predicted tokens, D width.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.bench.reference import import_environment
from vjepa_fast.errors import UserError
from vjepa_fast.inference import InferenceModel, build
from vjepa_fast.interop import meta, shapes
from vjepa_fast.interop.files import open_checkpoint
from vjepa_fast.interop.writing import probe_heads
from vjepa_fast.models.attentive import AttentiveClassifier
from vjepa_fast.models.vit import size_of
from vjepa_fast.ops.patch_embed import normalise

Differences = dict[str, float]
"""Largest absolute difference of each output."""
_NUM_TUBELETS = 2
_MASK_TOKEN = 1
"""The one that transformers takes, always."""


def build_classifier(state: Mapping[str, Tensor], num_heads: int) -> AttentiveClassifier:
    """An attentive probe with its weights, in eval mode.

    The output projection that lies in probes of V-JEPA 1 is left out: nothing reads it there either.

    Raises:
        UserError: it is no such probe.
    """
    state = {key: value for key, value in state.items() if ".xattn.proj." not in key}
    if "linear.weight" not in state or "pooler.query_tokens" not in state:
        raise UserError(f"an attentive probe has no linear.weight or pooler.query_tokens; it has {meta.shorten(state)}")
    num_classes, dim = state["linear.weight"].shape
    with torch.device("meta"):
        probe = AttentiveClassifier(dim, num_heads, num_classes, shapes.num_blocks(state, "pooler.blocks") + 1)
    if differences := shapes.differences(probe.state_dict(), state):
        raise UserError(f"the attentive probe is not one of V-JEPA: {differences}")
    probe.to_empty(device="cpu").load_state_dict(state)
    return probe.eval().requires_grad_(False)


def random_clip(model: InferenceModel) -> Tensor:
    """uint8 [1, T, H, W, 3] of the size that the model's config says and two tubelets, or all its frames where
    positions are a table: V-JEPA 1 stretches it over fewer frames, V-JEPA 2 and we take its first rows."""
    crop, frames = model.cfg.crop_size, model.cfg.num_frames
    assert crop is not None and frames is not None
    generator = torch.Generator().manual_seed(0)
    if model.cfg.use_rope:
        frames = _NUM_TUBELETS * model.encoder.tubelet_size
    return torch.randint(0, 256, (1, frames, *crop, 3), dtype=torch.uint8, generator=generator)


def context_and_target(model: InferenceModel, clip: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [1, K] each: every third token is predicted from the others."""
    grid = model.grid_of(clip)
    ids = torch.arange(grid[0] * grid[1] * grid[2])
    return ids[ids % 3 != 0][None], ids[ids % 3 == 0][None]


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    return float((found - expected).abs().max())


def assert_same_bits(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raises UserError unless both hold the same tensors; tables that nothing reads may have been left out."""
    differences = shapes.differences(before, after)
    unequal = [key for key in before if key in after and not torch.equal(before[key], after[key])]
    if differences or unequal:
        raise UserError(f"the {name} that was written is not the one that was read: {differences or unequal[0]}")


def against_hf(folder: Path) -> Differences:
    """What transformers makes of a folder, against what we make of it.

    Raises:
        ImportError: transformers is not installed.
        UserError: it does not load every weight.
    """
    transformers = importlib.import_module("transformers")
    checkpoint = open_checkpoint(folder)
    kind = transformers.VJEPA2ForVideoClassification if checkpoint.classifiers else transformers.VJEPA2Model
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        theirs, info = kind.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    unloaded = [key for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[name]
                if checkpoint.predictor is not None or ".predictor." not in f".{key}"]
    if unloaded:
        raise UserError(f"transformers does not load {meta.shorten(map(str, unloaded))} of {folder}")
    theirs = theirs.float().eval()
    model = build(checkpoint)
    clip = random_clip(model)
    pixels = normalise(clip, torch.float32).permute(0, 1, 4, 2, 3)
    found: Differences = {}
    with torch.no_grad():
        features = model.encode(clip)
        if checkpoint.classifiers:
            probe = build_classifier(checkpoint.classifiers[0], probe_heads(checkpoint)).float()
            found["classifier"] = largest(probe(features), theirs(pixels).logits)
            theirs = theirs.vjepa2
        context, target = context_and_target(model, clip)
        out = theirs(pixels, context_mask=[context], target_mask=[target])
        found["encoder"] = largest(features, out.last_hidden_state)
        if model.predictor is not None:
            seen = features.gather(1, context[..., None].expand(-1, -1, features.shape[-1]))
            predicted = model.predictor(seen, context, target, mask_index=_MASK_TOKEN)
            found["predictor"] = largest(predicted, out.predictor_output.last_hidden_state)
    return found


def against_meta(path: Path, root: Path) -> Differences:
    """What the modules of a checkout make of a file in the reference's layout, against what we make of it.

    Args:
        path: the file.
        root: checkout of facebookresearch/jepa (V-JEPA 1) or vjepa2.

    Raises:
        UserError: this is no such checkout, or its modules do not take every weight.
    """
    checkpoint = open_checkpoint(path)
    model = build(checkpoint)
    theirs = reference_modules(model, root)
    contents = meta.read(path, mmap=True)
    parts = {"encoder": contents[checkpoint.choose()]}
    if model.predictor is not None:
        parts["predictor"] = contents["predictor"]
    for name, state in parts.items():
        _load(theirs[name], meta.strip_prefixes(state), name, root)
    clip = random_clip(model)
    pixels = normalise(clip, torch.float32).permute(0, 4, 1, 2, 3)
    context, target = context_and_target(model, clip)
    found: Differences = {}
    with torch.no_grad(), warnings.catch_warnings():
        # The reference enters torch.backends.cuda.sdp_kernel at every attention.
        warnings.simplefilter("ignore", FutureWarning)
        features = theirs["encoder"](pixels)
        found["encoder"] = largest(model.encode(clip), features)
        if model.predictor is not None:
            seen = theirs["encoder"](pixels, [context])
            expected = theirs["predictor"](seen, context, target)
            found["predictor"] = largest(model.predict(clip, target, context, _MASK_TOKEN), expected)
        for number, state in enumerate(checkpoint.classifiers):
            heads = probe_heads(checkpoint)
            probe = _reference_probe(root, features.shape[-1], heads, state)
            own = build_classifier(state, heads)
            found[f"classifier {number}"] = largest(own(features), probe(features))
    return found


def reference_modules(model: InferenceModel, root: Path) -> dict[str, Callable[..., Tensor]]:
    """`encoder` and `predictor` of a checkout, of the sizes of a model, with random weights.

    The predictor takes context features, context ids and target ids, whatever version it is of.
    """
    cfg, size = model.cfg, size_of(model.cfg)
    assert cfg.crop_size is not None
    shared: dict[str, Any] = {
        "img_size": cfg.crop_size[0], "patch_size": cfg.patch_size, "num_frames": cfg.num_frames,
        "tubelet_size": cfg.tubelet_size, "uniform_power": cfg.uniform_power, "use_rope": cfg.use_rope,
        "wide_silu": cfg.wide_silu, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
    }
    with _importing(root):
        vit = importlib.import_module("src.models.vision_transformer")
        predictors = importlib.import_module("src.models.predictor")
    encoder = vit.VisionTransformer(
        embed_dim=size.embed_dim, depth=size.depth, num_heads=size.num_heads, mlp_ratio=size.mlp_ratio,
        use_silu=cfg.use_silu, **shared).eval()
    predictor = predictors.VisionTransformerPredictor(
        embed_dim=size.embed_dim, predictor_embed_dim=cfg.pred_embed_dim, depth=cfg.pred_depth,
        num_heads=cfg.pred_num_heads or size.num_heads, use_silu=cfg.use_pred_silu, use_mask_tokens=True,
        num_mask_tokens=cfg.num_mask_tokens or 1, **shared).eval()
    return {"encoder": encoder, "predictor": _V1Predictor(predictor) if _is_v1(root) else predictor}


class _V1Predictor(nn.Module):
    """V-JEPA 1's predictor with the arguments of V-JEPA 2's; its targets matter only for noised ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Tensor, target: Tensor) -> Tensor:
        out: Tensor = self.module(x, None, context, target)
        return out


def _reference_probe(root: Path, dim: int, heads: int, state: Mapping[str, Tensor]) -> nn.Module:
    with _importing(root):
        poolers = importlib.import_module("src.models.attentive_pooler")
    probe: nn.Module = poolers.AttentiveClassifier(
        embed_dim=dim, num_heads=heads, depth=shapes.num_blocks(state, "pooler.blocks") + 1,
        num_classes=len(state["linear.bias"])).eval()
    _load(probe, state, "attentive probe", root)
    return probe


def _is_v1(root: Path) -> bool:
    return not (root / "src" / "models" / "ac_predictor.py").is_file()


def _importing(root: Path) -> Any:
    if not (root / "src" / "models" / "vision_transformer.py").is_file():
        raise UserError(f"--reference: {root} has no src/models/vision_transformer.py; give a checkout of "
                        "facebookresearch/jepa or facebookresearch/vjepa2")
    return import_environment(root.resolve())


def _load(module: Any, state: Mapping[str, Tensor], name: str, root: Path) -> None:
    """Strict, but tables that the module makes itself may be missing, and those that nothing reads may be there."""
    inner = module.module if isinstance(module, _V1Predictor) else module
    own = inner.state_dict()
    tables = ("pos_embed", "predictor_pos_embed")
    state = {key: value for key, value in state.items() if key in own or key not in tables}
    if differences := shapes.differences(own, state):
        raise UserError(f"the reference's {name} ({root}) does not take every weight: {differences}")
    inner.load_state_dict(state)
