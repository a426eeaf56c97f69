"""The mask strategies: one row for each, which says everything about it but how it draws.

A row with a number is drawn by C++ (csrc/mask_rules.h, enum Strategy, by that number) and is defined in NumPy
(vjepa_fast.masking.mask_rules). A row without one is drawn in Python only; vjepa_fast.masking.strategies.register
adds one from outside the package.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import entry_points

ENTRY_POINTS = "vjepa_fast.mask_strategies"
"""Group of entry points by which installed packages offer strategies: name = the module that registers it."""
MAX_PLACES = 1 << 12
"""Of a frame, where places are drawn one by one: what the random counter can name."""
MAX_FRAMES = 1 << 8
"""Of a clip, where places are drawn one by one in every frame: likewise."""


@dataclass(frozen=True)
class MaskStrategy:
    """One way to choose the predicted tokens.

    Attributes:
        name: `strategy` of a mask in a config.
        number: what csrc/mask_rules.h calls it; None: drawn in Python only.
        keys: of MaskSpec that it uses, of those in STRATEGY_KEYS.
        doc: what it predicts, in a line.
        max_places: most tokens of a frame; None: any number.
        max_frames: most token frames; None: any number.
    """

    name: str
    number: int | None
    keys: frozenset[str]
    doc: str
    max_places: int | None = None
    max_frames: int | None = None


_BLOCKS = frozenset({"spatial_scale", "temporal_scale", "aspect_ratio", "num_blocks"})
_RATIO = frozenset({"ratio"})

_ROWS = (
    MaskStrategy("multiblock", 0, _BLOCKS, "blocks of one size a step at random places"),
    MaskStrategy("tube", 1, _RATIO | {"round_context_down"}, "the same random places in every frame", MAX_PLACES),
    MaskStrategy("temporal", 2, _RATIO, "consecutive frames"),
    MaskStrategy("patches", 3, _RATIO, "random places in each frame", MAX_PLACES, MAX_FRAMES),
    MaskStrategy(
        "mixture", 4, _RATIO | {"temporal_probability"}, "as temporal or as patches, by clip", MAX_PLACES, MAX_FRAMES
    ),
    MaskStrategy("future", 5, _RATIO, "the last frames"),
)

STRATEGIES: dict[str, MaskStrategy] = {row.name: row for row in _ROWS}
"""All strategies by name; those registered from outside come last."""
STRATEGY_KEYS = frozenset().union(*(row.keys for row in _ROWS))
"""Keys of MaskSpec that belong to some strategies; every strategy obeys the others."""


def find_strategy(name: str) -> MaskStrategy:
    """The row of a strategy. Where it is not there yet, the module that an installed package names for it is imported.

    Args:
        name: of the strategy.

    Raises:
        ValueError: there is no such strategy, or its module cannot be imported; starts with the key, `strategy`.
    """
    if name not in STRATEGIES:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            try:
                entry.load()
            except Exception as error:
                raise ValueError(f"strategy {name} is in {entry.value}, which cannot be imported: {error}") from error
            if name not in STRATEGIES:
                raise ValueError(f"strategy {name} is not registered by {entry.value}, which its entry point names")
    if name in STRATEGIES:
        return STRATEGIES[name]
    known = [*STRATEGIES, *sorted(set(entry_points(group=ENTRY_POINTS).names) - set(STRATEGIES))]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"strategy is {name!r}; expected {', '.join(known)}{hint}")
