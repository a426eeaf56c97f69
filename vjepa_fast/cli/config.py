"""Options that select a config, shared by several verbs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from vjepa_fast.cli.console import say
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import Config, load_config, load_recipe, recipe_names

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        show_default=False,
        help="Dotted keys on top of the config, values in YAML, as in vjepa-fast train.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help=f"A packaged recipe: {', '.join(recipe_names())}. Default: demo."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A YAML file: ours, or Meta's pretraining YAML of V-JEPA 1, 2 or 2.1, unchanged.",
    ),
]


def load(recipe: str | None, config: Path | None, overrides: list[str]) -> Config:
    """The config of a command line; its warnings go to stderr.

    Args:
        recipe, config: at most one of them; neither means the demo.
        overrides: `section.key=value` each.

    Raises:
        ConfigError: both are given, an argument is no override, or the config is not accepted.
    """
    if recipe is not None and config is not None:
        raise ConfigError(
            "--recipe and --config are both given; give one. A config file can start from a recipe with "
            f"`base: {recipe}`"
        )
    for text in overrides:
        if "=" not in text:
            hint = "expected section.key=value"
            if text in recipe_names():
                hint = f"did you mean --recipe {text}?"
            elif Path(text).suffix in (".yaml", ".yml"):
                hint = f"did you mean --config {text}?"
            raise ConfigError(f"unexpected argument {text!r}; {hint}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cfg = load_config(config, overrides) if config is not None else load_recipe(recipe or "demo", overrides)
    for warning in caught:
        say("warning", str(warning.message))
    return cfg
