"""Sizes of the encoders by name, and which of them go together with the rest of a config."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import ModelConfig


@dataclass(frozen=True)
class Size:
    """Width, depth, heads and MLP ratio of an encoder."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
    "vit_giant": Size(1408, 40, 16, 48 / 11),
    "vit_giant_xformers": Size(1408, 40, 22, 48 / 11),
    # The reference passes the 64 / 13 of the gigantic models under a misspelt name, so they are built with 4.
    "vit_gigantic": Size(1664, 48, 16),
    "vit_gigantic_xformers": Size(1664, 48, 26),
}

GIGANTIC_MLP_RATIO = 64 / 13
"""Of the gigantic models of V-JEPA 2.1, which passes it under its right name."""

NUM_LEVELS = 4
"""Depths at which the encoder of V-JEPA 2.1 has a norm."""


def level_blocks(depth: int) -> tuple[int, ...]:
    """After which blocks those norms stand (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1/models/
    vision_transformer.py, hierarchical_layers): the quarters, but for the gigantic models' third.

    Raises:
        ConfigError: a depth that cannot be quartered.
    """
    if depth % NUM_LEVELS:
        raise ConfigError(
            f"model.depth={depth} is not a multiple of {NUM_LEVELS}; V-JEPA 2.1 "
            "(model.n_output_distillation) takes features after each quarter of the blocks"
        )
    quarters = tuple(depth * (level + 1) // NUM_LEVELS - 1 for level in range(NUM_LEVELS))
    return (11, 23, 37, 47) if depth == 48 else quarters


def check_positions(name: str, width: int, num_heads: int, cfg: ModelConfig) -> None:
    """Raises ConfigError for a width that its kind of positions cannot fill."""
    if cfg.use_rope and width // num_heads < 6:
        raise ConfigError(
            f"{name}={width} with {num_heads} heads leaves {width // num_heads} features a head; RoPE "
            "needs at least 6, two for each axis"
        )
    unit = 4 if cfg.uniform_power else 8
    if not cfg.use_rope and cfg.positions == "sincos" and width % unit:
        raise ConfigError(f"{name}={width} is not a multiple of {unit}, as sine-cosine positions need")


def size_of(cfg: ModelConfig) -> Size:
    """The size of a configured encoder.

    Raises:
        ConfigError: unknown model_name, or a width the heads do not divide.
    """
    name = cfg.model_name.removesuffix("_rope")
    if name not in SIZES:
        raise ConfigError(f"model.model_name is {cfg.model_name!r}; expected one of {', '.join(SIZES)}")
    base = SIZES[name]
    if cfg.n_output_distillation is not None and name.startswith("vit_gigantic"):
        base = replace(base, mlp_ratio=GIGANTIC_MLP_RATIO)
    size = Size(
        cfg.embed_dim or base.embed_dim,
        cfg.depth or base.depth,
        cfg.num_heads or base.num_heads,
        cfg.mlp_ratio or base.mlp_ratio,
    )
    check_positions("model.embed_dim", size.embed_dim, size.num_heads, cfg)
    if size.embed_dim % size.num_heads:
        raise ConfigError(f"model.embed_dim={size.embed_dim} is not a multiple of model.num_heads={size.num_heads}")
    return size
