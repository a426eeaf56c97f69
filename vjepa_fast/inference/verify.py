"""Verifies a converted model: runs it here and in the other library on the same clip and compares.

Legend: B clips, N tokens, K predicted tokens, D width.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.checkpoints import infer_config, meta_format
from vjepa_fast.checkpoints.export import probe_heads
from vjepa_fast.checkpoints.open import open_checkpoint
from vjepa_fast.common.checkouts import import_environment
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.inference.loading import build
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.models.attentive import AttentiveClassifier
from vjepa_fast.models.sizes import size_of
from vjepa_fast.ops.patch_embed import normalise

Differences = dict[str, float]
"""Norm of the difference over norm, of each output."""
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
        raise UserError(
            f"an attentive probe has no linear.weight or pooler.query_tokens; it has {meta_format.shorten(state)}"
        )
    num_classes, dim = state["linear.weight"].shape
    with torch.device("meta"):
        probe = AttentiveClassifier(dim, num_heads, num_classes, infer_config.num_blocks(state, "pooler.blocks") + 1)
    if differences := infer_config.differences(probe.state_dict(), state):
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


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm."""
    return float((found - expected).norm() / expected.norm())


def assert_same_bits(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raises UserError unless both hold the same tensors; tables that nothing reads may have been left out."""
    differences = infer_config.differences(before, after)
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
    unloaded = [
        key
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in info[name]
        if checkpoint.predictor is not None or ".predictor." not in f".{key}"
    ]
    if unloaded:
        raise UserError(f"transformers does not load {meta_format.shorten(map(str, unloaded))} of {folder}")
    theirs = theirs.float().eval()
    model = build(checkpoint)
    clip = random_clip(model)
    pixels = normalise(clip, torch.float32).permute(0, 1, 4, 2, 3)
    found: Differences = {}
    with torch.no_grad():
        features = model.encode(clip)
        if checkpoint.classifiers:
            probe = build_classifier(checkpoint.classifiers[0], probe_heads(checkpoint)).float()
            found["classifier"] = difference(probe(features), theirs(pixels).logits)
            theirs = theirs.vjepa2
        context, target = context_and_target(model, clip)
        out = theirs(pixels, context_mask=[context], target_mask=[target])
        found["encoder"] = difference(features, out.last_hidden_state)
        if model.predictor is not None:
            seen = features.gather(1, context[..., None].expand(-1, -1, features.shape[-1]))
            predicted = model.predictor(seen, context, target, mask_index=_MASK_TOKEN)
            found["predictor"] = difference(predicted, out.predictor_output.last_hidden_state)
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
    cfg = model.cfg
    theirs = reference_modules(cfg, root)
    contents = meta_format.read(path, mmap=True)
    parts = {"encoder": contents[checkpoint.choose()]}
    if model.predictor is not None:
        parts["predictor"] = contents["predictor"]
    for name, state in parts.items():
        _load(theirs[name], meta_format.strip_prefixes(state), name, root)
    clip = random_clip(model)
    pixels = normalise(clip, torch.float32).permute(0, 4, 1, 2, 3)
    context, target = context_and_target(model, clip)
    found: Differences = {}
    with torch.no_grad(), warnings.catch_warnings():
        # The reference enters torch.backends.cuda.sdp_kernel at every attention.
        warnings.simplefilter("ignore", FutureWarning)
        features = theirs["encoder"](pixels)
        found["encoder"] = difference(model.encode(clip), features)
        if model.predictor is not None and cfg.use_mask_tokens:
            # V-JEPA 2.1 predicts from more than its features for others.
            options = {} if cfg.n_output_distillation is None else {"training": True}
            expected = theirs["predictor"](theirs["encoder"](pixels, [context], **options), context, target)
            found["predictor"] = difference(
                model.predict(clip, target, context, _MASK_TOKEN),
                expected[0] if isinstance(expected, tuple) else expected,
            )
        for number, state in enumerate(checkpoint.classifiers):
            heads = probe_heads(checkpoint)
            depth = infer_config.num_blocks(state, "pooler.blocks") + 1
            probe = reference_probe(root, features.shape[-1], heads, len(state["linear.bias"]), depth)
            _load(probe, state, "attentive probe", root)
            own = build_classifier(state, heads)
            found[f"classifier {number}"] = difference(own(features), probe(features))
    return found


def reference_modules(cfg: ModelConfig, root: Path) -> dict[str, Callable[..., Any]]:
    """`encoder` and `predictor` of a checkout, of the sizes of a model, with random weights, on the default device.

    The predictor takes context features, context ids and target ids, whatever version it is of.

    Raises:
        UserError: this is no such checkout, or one without V-JEPA 2.1 where that is wanted.
    """
    size = size_of(cfg)
    assert cfg.crop_size is not None
    shared: dict[str, Any] = {
        "img_size": cfg.crop_size[0],
        "patch_size": cfg.patch_size,
        "num_frames": cfg.num_frames,
        "tubelet_size": cfg.tubelet_size,
        "uniform_power": cfg.uniform_power,
        "use_rope": cfg.use_rope,
        "wide_silu": cfg.wide_silu,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
    }
    of_predictor: dict[str, Any] = {}
    package = "src.models"
    if cfg.n_output_distillation is not None:
        package = "app.vjepa_2_1.models"
        shared |= {
            "interpolate_rope": cfg.interpolate_rope,
            "img_temporal_dim_size": cfg.img_temporal_dim_size,
            "modality_embedding": cfg.modality_embedding,
            "n_output_distillation": cfg.n_output_distillation,
        }
        of_predictor = {"teacher_embed_dim": cfg.teacher_embed_dim, "return_all_tokens": cfg.return_all_tokens}
    with importing(root, package):
        vit = importlib.import_module(f"{package}.vision_transformer")
        predictors = importlib.import_module(f"{package}.predictor")
    encoder = vit.VisionTransformer(
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        use_silu=cfg.use_silu,
        **shared,
    ).eval()
    predictor = predictors.VisionTransformerPredictor(
        embed_dim=size.embed_dim,
        predictor_embed_dim=cfg.pred_embed_dim,
        depth=cfg.pred_depth,
        num_heads=cfg.pred_num_heads or size.num_heads,
        use_silu=cfg.use_pred_silu,
        use_mask_tokens=cfg.use_mask_tokens,
        num_mask_tokens=cfg.num_mask_tokens or 1,
        **of_predictor,
        **shared,
    ).eval()
    return {"encoder": encoder, "predictor": _V1Predictor(predictor) if _is_v1(root) else predictor}


class _V1Predictor(nn.Module):
    """V-JEPA 1's predictor with the arguments of V-JEPA 2's; its targets matter only for noised ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Tensor, target: Tensor) -> Tensor:
        out: Tensor = self.module(x, None, context, target)
        return out


def reference_probe(root: Path, dim: int, heads: int, num_classes: int, depth: int) -> nn.Module:
    """An attentive probe of a checkout, in eval mode, with random weights; see AttentiveClassifier."""
    with importing(root):
        poolers = importlib.import_module("src.models.attentive_pooler")
    probe: nn.Module = poolers.AttentiveClassifier(embed_dim=dim, num_heads=heads, depth=depth, num_classes=num_classes)
    return probe.eval()


def _is_v1(root: Path) -> bool:
    return not (root / "src" / "models" / "ac_predictor.py").is_file()


def importing(root: Path, package: str = "src.models") -> AbstractContextManager[None]:
    """In which modules of a checkout's package can be imported.

    Raises:
        UserError: it has no such package.
    """
    path = Path(*package.split(".")) / "vision_transformer.py"
    if not (root / path).is_file():
        version = " with V-JEPA 2.1 (of 2026-03-23 or later)" if "2_1" in package else ""
        raise UserError(
            f"--reference: {root} has no {path}; give a checkout of facebookresearch/jepa or "
            f"facebookresearch/vjepa2{version}"
        )
    return import_environment(root.resolve())


def _load(module: Any, state: Mapping[str, Tensor], name: str, root: Path) -> None:
    """Strict, but tables that the module makes itself may be missing, and those that nothing reads may be there."""
    inner = module.module if isinstance(module, _V1Predictor) else module
    own = inner.state_dict()
    state = {key: value for key, value in state.items() if key in own or key not in infer_config.UNREAD_TABLES}
    if differences := infer_config.differences(own, state):
        raise UserError(f"the reference's {name} ({root}) does not take every weight: {differences}")
    inner.load_state_dict(state)
