"""Sections `mask` and `img_mask`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vjepa_fast.config.mask_strategies import STRATEGY_KEYS, find_strategy
from vjepa_fast.config.sections.base import PositiveInt, Range, Section


class MaskSpec(Section):
    """One mask; the default strategy is the reference's (src/masks/multiseq_multiblock3d.py).

    What the strategies predict, and which keys each of them uses, is in vjepa_fast.config.mask_strategies.
    """

    strategy: str = "multiblock"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share that is predicted; every strategy but multiblock."""
    round_context_down: bool = False
    """Of `tube`: see int(places * (1 - ratio)) places of a frame, V-JEPA 1's rule; else the number of those predicted
    is rounded to the nearest."""
    temporal_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the clips that are masked like `temporal` in a `mixture`; the others are like `patches`."""
    spatial_scale: Range = (0.2, 0.8)
    """Area of one block as a fraction of the frame: drawn uniformly between the two."""
    temporal_scale: Range = (1.0, 1.0)
    aspect_ratio: Range = (0.3, 3.0)
    """Height over width of a block."""
    num_blocks: Annotated[int, Field(gt=0, le=1024)] = 1
    max_temporal_keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The context comes from the first fraction of the clip only."""
    max_keep: PositiveInt | None = None
    """Longest context in tokens."""
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False
    """Swap the roles: the blocks are the context."""

    @model_validator(mode="after")
    def _check(self) -> MaskSpec:
        for name, top in (("spatial_scale", 1.0), ("temporal_scale", 1.0), ("aspect_ratio", 255.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} is [{low}, {high}]; expected 0 < low <= high <= {top:g}")
        if self.full_complement and self.pred_full_complement:
            raise ValueError("full_complement and pred_full_complement exclude each other; set one of them to false")
        unused = STRATEGY_KEYS - find_strategy(self.strategy).keys
        # A written config names every key, so only a value that would have changed something counts.
        changed = [
            name
            for name in type(self).model_fields
            if name in unused and getattr(self, name) != type(self).model_fields[name].default
        ]
        if changed:
            raise ValueError(
                f"strategy {self.strategy} does not use {' and '.join(changed)}; remove "
                f"{'it' if len(changed) == 1 else 'them'} or choose another strategy"
            )
        return self


class MaskConfig(Section):
    """All masks of a clip. A bare list of masks is accepted for `masks`."""

    masks: Annotated[list[MaskSpec], Field(min_length=1, max_length=64)] = [
        MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=8),
        MaskSpec(spatial_scale=(0.7, 0.7), aspect_ratio=(0.75, 1.5), num_blocks=2),
    ]
    source: Literal["counter", "reference"] = "counter"
    """`counter`: pure function of (seed, step, sample). `reference`: the reference's own random streams."""
    truncate: Literal["batch_min", "none"] = "batch_min"
    """`batch_min`: every clip of a truncation group keeps as many ids as the shortest, the reference's rule."""
    group_size: PositiveInt | None = None
    """Clips per truncation group; None: the configured batch size."""
    clips_per_mask: PositiveInt = 1
    """Clips that share their masks: 1, or data.clips_per_video, as in V-JEPA 1, where all clips of a video do."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"masks": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        others = sorted({spec.strategy for spec in self.masks} - {"multiblock"})
        if self.source == "reference" and others:
            raise ValueError(
                f"source reference draws multiblock masks only, but a mask has strategy {others[0]} (the "
                "reference's tubes come from a stream that its loading processes share with cropping); "
                "set source to counter"
            )
        return self
