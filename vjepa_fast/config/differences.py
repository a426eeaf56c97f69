"""Flattens configs to lists of keys and compares a config with a packaged recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from vjepa_fast.config import contents, load_recipe, recipe_names

_PLACES = frozenset({"train.out", "data.cache_dir"})
"""Keys that say where something lies, and nothing about a run."""


@dataclass(frozen=True)
class Difference:
    """A key that a config and a recipe have different values of."""

    key: str
    recipe: Any
    """None also where the recipe has no such key."""
    config: Any
    """Value of the key in the config."""


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config that is plain dicts and lists; of lists of sections also their lengths."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield f"{prefix} (how many)", len(value)
        for index, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def from_nearest_recipe(raw: dict[str, Any]) -> tuple[str, list[Difference]]:
    """The packaged recipe that a config differs from in the fewest keys, and those keys.

    Args:
        raw: content of a YAML file that `dump` wrote, of this version or an earlier one.
    """
    ours = dict(leaves(raw))
    found = {name: _differences(_leaves_of(name), ours) for name in recipe_names()}
    nearest = min(found, key=lambda name: len(found[name]))
    return nearest, found[nearest]


@cache
def _leaves_of(recipe: str) -> dict[str, Any]:
    return dict(leaves(contents(load_recipe(recipe))))


def _differences(recipe: dict[str, Any], config: dict[str, Any]) -> list[Difference]:
    return [
        Difference(key, recipe.get(key), config.get(key))
        for key in dict.fromkeys([*recipe, *config])
        if key not in _PLACES and recipe.get(key) != config.get(key)
    ]
