"""Reads configs: our YAML, the reference's YAML or a packaged recipe, with overrides on top."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import overrides as _overrides
from vjepa_fast.config import yaml_io
from vjepa_fast.config.messages import explain
from vjepa_fast.config.meta import v1, v2, v21
from vjepa_fast.config.schema import Config, MaskConfig

__all__ = [
    "Config",
    "ConfigWarning",
    "contents",
    "dump",
    "load_config",
    "load_recipe",
    "recipe_names",
    "recipe_summary",
]

_COPIES = {
    "model": {"crop_size", "patch_size", "tubelet_size", "num_frames", "dtype", "return_all_tokens"},
    "data": {"seed"},
}
"""Keys that always equal a key of another section, which is the one to write."""


class ConfigWarning(UserWarning):
    """Something in a config has no effect."""


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(entry.name[:-5] for entry in (files(__name__) / "recipes").iterdir() if entry.name.endswith(".yaml"))


def recipe_summary(name: str) -> str:
    """What a recipe is for: the first line of its file, up to a bracket, a colon or the end of the sentence.

    Args:
        name: one of `recipe_names()`.
    """
    first = _recipe_text(name).partition("\n")[0]
    return re.split(r" \(|[:;] |\.(?: |$)", first.removeprefix("# "))[0]


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Config:
    """A packaged recipe.

    Args:
        name: one of `recipe_names()`.
        overrides: `section.key=value` each, values in YAML, as in `optimization.lr=1e-4`.

    Raises:
        ConfigError: no such recipe, or a key or value that the schema does not accept.
    """
    return _build(_recipe(name), f"recipe {name}", overrides)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A YAML file, ours or a pretraining config of facebookresearch/jepa or vjepa2, recognised by its keys.

    A file of ours may start from a recipe with `base: NAME`. Keys of the reference's file that the reference never
    reads are named in one ConfigWarning; keys absent from it have the reference's defaults.

    Args:
        path: the file.
        overrides: as in `load_recipe`; the reference's dotted names (`meta.seed`) are accepted too.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not accepted. The message names the file and key.
    """
    path = Path(path)
    raw = yaml_io.read(path)
    if v2.is_meta(raw):
        v2.check_kind(raw, str(path))
        reference = v21 if raw.get("app") == v21.APP else v1 if v1.is_v1(raw) else v2
        raw, ignored = reference.convert(raw, str(path))
        if ignored:
            warnings.warn(f"{path}: ignored, nothing reads these: {', '.join(ignored)}", ConfigWarning, stacklevel=2)
    elif "base" in raw:
        base = raw.pop("base")
        if not isinstance(base, str):
            raise ConfigError(
                f"{path}: base is {yaml_io.describe(base)}; expected a recipe: {', '.join(recipe_names())}"
            )
        raw = _overrides.merge(_recipe(base), {name: value for name, value in raw.items() if value is not None})
    return _build(raw, str(path), overrides)


def dump(config: Config) -> str:
    """The whole config as YAML; `load_config` of the text gives an equal one. Keys that only copy a key of another
    section (model.crop_size is data.crop_size) are left out."""
    return yaml_io.write(contents(config))


def contents(config: Config) -> dict[str, Any]:
    """What `dump` writes, as plain dicts, lists and scalars."""
    return config.model_dump(mode="json", exclude=_COPIES)


def _recipe(name: str) -> dict[str, Any]:
    names = recipe_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(f"no recipe is called {name!r}; {hint}recipes: {', '.join(names)}")
    raw = yaml_io.parse(_recipe_text(name), f"recipe {name}")
    assert isinstance(raw, dict)
    base = raw.pop("base", None)
    return raw if base is None else _overrides.merge(_recipe(base), raw)


def _recipe_text(name: str) -> str:
    return (files(__name__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _build(raw: dict[str, Any], source: str, overrides: Iterable[str]) -> Config:
    # A section that is named and left empty has its defaults.
    raw = copy.deepcopy({name: value for name, value in raw.items() if value is not None})
    written = _overrides.apply(raw, overrides, MaskConfig().masks)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, source, written)) from None
