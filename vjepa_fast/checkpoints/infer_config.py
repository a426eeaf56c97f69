"""Infers a model's config from the names and shapes of its parameters.

Shapes tell width, depth, patch and tubelet size, the MLP, the predictor's sizes and, by a stored sine-cosine table, the
grid. They do not tell the number of heads, how RoPE spreads its angles or the crop size: those are taken from what the
file says of itself, else from the released models (README of facebookresearch/jepa and facebookresearch/vjepa2), else
by a rule; whatever was assumed is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.messages import explain
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.models.positions import sincos_table
from vjepa_fast.models.sizes import GIGANTIC_MLP_RATIO, NUM_LEVELS, SIZES, Size

State = Mapping[str, Tensor]

_RELEASED = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant_xformers")
"""By width; ViT-g was released with 22 heads, not with the 16 of `vit_giant`."""
_ROPE_TABLES = {2048: (16, 256), 8192: (64, 256), 18432: (64, 384)}
"""Tokens of tables in released V-JEPA 2 files, which nothing reads, with the frames and crop they are of."""
UNREAD_TABLES = ("pos_embed", "predictor_pos_embed")
"""Their keys."""
_RELEASED_MASK_TOKENS = 10
DEFAULT_CROP, DEFAULT_FRAMES = (256, 256), 16
"""Of models with RoPE whose file says nothing: what their first stage of training sees."""
_V21_CROP = (384, 384)
"""All that was released of V-JEPA 2.1."""
_ELSEWHERE = {
    "patch_size": "data.patch_size",
    "tubelet_size": "data.tubelet_size",
    "return_all_tokens": "loss.predict_all",
}
"""Fields of the model that a config writes in another section."""
_MAX_SHOWN = 3
_HEAD_DIM = 64
_PREDICTOR_HEAD_DIM = 32


def guess(
    encoder: State,
    predictor: State | None = None,
    stated: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    source: str = "the checkpoint",
) -> tuple[ModelConfig, list[str]]:
    """The config of the model that some weights are of.

    Args:
        encoder: state dict under the reference's names, without prefixes.
        predictor: the same, or None.
        stated: fields of ModelConfig that the file names; they come before guesses.
        overrides: fields of ModelConfig from the user; they come before everything.
        source: what the weights are called in messages.

    Returns:
        The config, and a sentence for everything that was assumed.

    Raises:
        UserError: these are not the weights of a V-JEPA encoder.
        ConfigError: an override that does not exist or does not fit.
    """
    later = set(stated or {}) - set(ModelConfig.model_fields)
    if later:
        raise UserError(
            f"{source}: the config in the file has {', '.join(sorted(later))}, of which this version of "
            "vjepa-fast does not know; open it with the version that wrote it, or a later one"
        )
    known = {name: value for name, value in {**(stated or {}), **(overrides or {})}.items() if value is not None}
    notes: list[str] = []
    fields, size = _encoder_fields(encoder, source)
    rope, table = _positions(encoder, predictor, known, fields, notes)
    fields |= {"use_rope": rope, **table}
    fields |= _size_fields(size, known, notes)
    if "norms_block.0.weight" in encoder:
        fields |= _v21_fields(encoder, predictor)
    # With RoPE neither changes what the model computes.
    fields.setdefault("crop_size", DEFAULT_CROP)
    fields.setdefault("num_frames", DEFAULT_FRAMES if fields["_video"] else 1)
    del fields["_video"]
    if predictor is not None:
        heads = known.get("num_heads") or fields.get("num_heads") or SIZES[fields["model_name"]].num_heads
        fields |= _predictor_fields(predictor, rope, heads, known, notes)
    try:
        return ModelConfig.model_validate({**fields, **known}), notes
    except ValidationError as error:
        raise ConfigError(explain(error, source, {})) from None


def describe(cfg: ModelConfig) -> str:
    """The keys of a config that make a checkpoint fit, as overrides are written."""
    names = [
        "model_name",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "patch_size",
        "tubelet_size",
        "use_rope",
        "use_silu",
        "pred_depth",
        "pred_embed_dim",
        "pred_num_heads",
        "num_mask_tokens",
    ]
    if cfg.n_output_distillation is not None:
        names += [
            "rope_style",
            "interpolate_rope",
            "n_output_distillation",
            "teacher_embed_dim",
            "return_all_tokens",
            "img_temporal_dim_size",
            "modality_embedding",
        ]
    if not cfg.use_rope:
        names.append("positions")
    values = {name: getattr(cfg, name) for name in names}
    version = "" if cfg.n_output_distillation is None else " (it is of V-JEPA 2.1)"
    return (
        " ".join(
            f"{_ELSEWHERE.get(name, f'model.{name}')}={_plain(value)}"
            for name, value in values.items()
            if value is not None
        )
        + version
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def fitting(encoder: State, predictor: State | None) -> str:
    """What `describe` says of the model that some weights are of; empty where they are of none."""
    try:
        return describe(guess(encoder, predictor)[0])
    except UserError:
        return ""


def differences(own: State, state: State) -> str:
    """What keeps a state dict from being loaded, empty where nothing does: names of other shapes, missing, unexpected.

    Args:
        own: of the model, whose tensors may be on the meta device.
        state: to be loaded.
    """
    kinds = (
        (
            "",
            [
                f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        ),
        ("missing ", [key for key in own if key not in state]),
        ("unexpected ", [key for key in state if key not in own]),
    )
    parts = []
    for kind, found in kinds:
        parts += [kind + one for one in found[:_MAX_SHOWN]]
        if len(found) > _MAX_SHOWN:
            parts.append(f"{len(found) - _MAX_SHOWN} more {kind.strip() or 'of other shapes'}")
    return "; ".join(parts)


def num_blocks(state: State, name: str) -> int:
    """How many blocks `<name>.<i>.` a state dict has."""
    return len({match[1] for key in state if (match := re.match(rf"{re.escape(name)}\.(\d+)\.", key))})


def _encoder_fields(encoder: State, source: str) -> tuple[dict[str, Any], Size]:
    missing = [
        key
        for key in ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight")
        if key not in encoder
    ]
    if missing:
        raise UserError(f"{source} is not of a V-JEPA encoder: it has no {missing[0]}")
    kernel = encoder["patch_embed.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    tubelet = kernel.shape[2] if kernel.ndim == 5 else None
    hidden = encoder["blocks.0.mlp.fc1.weight"].shape[0]
    silu = "blocks.0.mlp.fc3.weight" in encoder
    wide, ratio = _mlp(width, hidden, silu)
    fields: dict[str, Any] = {
        "patch_size": patch,
        "tubelet_size": tubelet or 2,
        "use_silu": silu,
        "_video": tubelet is not None,
    }
    if silu:
        fields["wide_silu"] = wide
    return fields, Size(width, num_blocks(encoder, "blocks"), 0, ratio)


def _v21_fields(encoder: State, predictor: State | None) -> dict[str, Any]:
    """What V-JEPA 2.1 has beside V-JEPA 2. All its models spread and interpolate positions alike."""
    fields: dict[str, Any] = {
        "rope_style": "interleaved",
        "interpolate_rope": True,
        "n_output_distillation": NUM_LEVELS,
        "img_temporal_dim_size": 1 if "patch_embed_img.proj.weight" in encoder else None,
        "modality_embedding": "video_mod_embed" in encoder,
        "crop_size": _V21_CROP,
    }
    if predictor is not None:
        if "predictor_embed.weight" in predictor:
            fields["n_output_distillation"] = 1
        fields["return_all_tokens"] = "predictor_proj_context.weight" in predictor
        width = encoder["norms_block.0.weight"].shape[0]
        predicted = predictor["predictor_proj.weight"].shape[0]
        if predicted != fields["n_output_distillation"] * width:
            fields["teacher_embed_dim"] = predicted
    return fields


def _mlp(width: int, hidden: int, silu: bool) -> tuple[bool, float]:
    """Whether the width is shrunk to two thirds, and the ratio that gives it."""
    ratios = sorted({GIGANTIC_MLP_RATIO, *(size.mlp_ratio for size in SIZES.values())})
    if silu:
        for ratio in ratios:
            if (int(2 * int(width * ratio) / 3) + 7) // 8 * 8 == hidden:
                return True, ratio
    for ratio in ratios:
        if int(width * ratio) == hidden:
            return False, ratio
    # Half a unit above, so that rounding down gives the width.
    return False, hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _positions(
    encoder: State, predictor: State | None, known: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]
) -> tuple[bool, dict[str, Any]]:
    """Whether positions are RoPE, and what a stored table says: frames, crop and uniform_power."""
    if "learned_positions.spatial" in encoder:
        places, times = (encoder[f"learned_positions.{axis}"].shape[1] for axis in ("spatial", "temporal"))
        side = math.isqrt(places) * fields["patch_size"]
        return False, {"positions": "learned", "num_frames": times * fields["tubelet_size"], "crop_size": (side, side)}
    table = encoder.get("pos_embed")
    if table is None:
        return True, {}
    num_tokens = table.shape[-2]
    mask_tokens = 0 if predictor is None else _num_mask_tokens(predictor)
    is_released_rope = num_tokens in _ROPE_TABLES and mask_tokens in (0, _RELEASED_MASK_TOKENS)
    if known.get("use_rope", is_released_rope):
        if "use_rope" not in known:
            notes.append(
                f"a table of {num_tokens} positions lies in the file as in those released of V-JEPA 2, which "
                "rotate and do not read it: use_rope=true is assumed"
            )
        frames, crop = _ROPE_TABLES.get(num_tokens, (None, None))
        return True, {"num_frames": frames, "crop_size": (crop, crop)} if frames and crop else {}
    return False, _grid_of_table(table.reshape(num_tokens, -1), known, fields, notes)


def _grid_of_table(
    table: Tensor, known: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Frames, crop and uniform_power of a stored sine-cosine table, by making the tables of all square grids."""
    num_tokens, dim = table.shape
    video, patch, tubelet = fields["_video"], fields["patch_size"], fields["tubelet_size"]
    grids = [
        (num_tokens // side**2, side, side)
        for side in range(1, int(num_tokens**0.5) + 1)
        if num_tokens % side**2 == 0 and (video or side**2 == num_tokens)
    ]
    if not table.is_meta:
        rows = table.float()
        for grid in reversed(grids):
            for uniform in (True, False):
                if video or not uniform:
                    made = sincos_table(dim, grid, uniform, video)
                    if torch.allclose(made, rows, atol=1e-2):
                        return {
                            "num_frames": grid[0] * tubelet if video else 1,
                            "crop_size": (grid[1] * patch, grid[2] * patch),
                            "uniform_power": uniform,
                        }
    # A table that is no sine and cosine, or of another shape than a square: eight tubelets are what was released.
    grid = next((grid for grid in grids if grid[0] == 8), grids[-1])
    if not {"num_frames", "crop_size"} <= known.keys():
        notes.append(
            f"the {num_tokens} positions of the table are assumed to be a grid of {grid[0]} x {grid[1]} x "
            f"{grid[2]}; num_frames and crop_size say otherwise"
        )
    return {
        "num_frames": grid[0] * tubelet if video else 1,
        "crop_size": (grid[1] * patch, grid[2] * patch),
        "uniform_power": True,
    }


def _size_fields(size: Size, known: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """model_name where a released size fits, with what differs from it."""
    width, depth = size.embed_dim, size.depth
    names = [name for name in _RELEASED if SIZES[name].embed_dim == width]
    if width == SIZES["vit_gigantic"].embed_dim:
        names = ["vit_gigantic_xformers"]
    wanted = known.get("num_heads")
    if names:
        base = SIZES[names[0]]
        fields: dict[str, Any] = {"model_name": names[0]}
        if depth != base.depth:
            fields["depth"] = depth
        if size.mlp_ratio != base.mlp_ratio:
            fields["mlp_ratio"] = size.mlp_ratio
        return fields
    fields = {"model_name": "vit_tiny", "embed_dim": width, "depth": depth, "mlp_ratio": size.mlp_ratio}
    if wanted is None:
        fields["num_heads"] = max(1, width // _HEAD_DIM) if width % _HEAD_DIM == 0 or width < _HEAD_DIM else 1
        notes.append(
            f"num_heads is assumed to be {fields['num_heads']}: shapes do not tell, and no released model has "
            f"a width of {width}"
        )
    return fields


def _num_mask_tokens(predictor: State) -> int:
    return sum(1 for key in predictor if re.fullmatch(r"mask_tokens\.\d+", key))


def _predictor_fields(
    predictor: State, rope: bool, encoder_heads: int, known: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    embed = predictor.get("predictor_embed.weight", predictor.get("predictor_embed.2.weight"))
    if embed is None:
        raise UserError("the predictor in the checkpoint is not of a V-JEPA predictor: it has no predictor_embed")
    width = embed.shape[0]
    fields: dict[str, Any] = {
        "pred_embed_dim": width,
        "pred_depth": num_blocks(predictor, "predictor_blocks"),
        "num_mask_tokens": _num_mask_tokens(predictor) or None,
        "use_mask_tokens": _num_mask_tokens(predictor) > 0,
        "use_pred_silu": "predictor_blocks.0.mlp.fc3.weight" in predictor,
    }
    if "pred_num_heads" not in known:
        # V-JEPA 1 takes the encoder's number, V-JEPA 2's files say 12 of 32 features each.
        heads = encoder_heads if not rope or width % _PREDICTOR_HEAD_DIM else width // _PREDICTOR_HEAD_DIM
        fields["pred_num_heads"] = heads
        if width != 384:
            notes.append(f"pred_num_heads is assumed to be {heads}: no released predictor has a width of {width}")
    return fields
