"""A section of options as a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import typer
from pydantic import ValidationError

from vjepa_fast.cli.console import exit_codes
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.sections.base import Section

OptionsT = TypeVar("OptionsT", bound=Section)


def command(section: type[OptionsT], run: Callable[[OptionsT], None]) -> Callable[..., None]:
    """A function for typer whose options are the fields of a section.

    Args:
        section: its fields are annotated with typer's options and arguments, which hold the limits of the values.
        run: gets the section; its `model_fields_set` are the options that the user gave. Its docstring is the help.
            Errors of the user end the program with their message and exit code.
    """

    def verb(ctx: typer.Context, **values: Any) -> None:
        with exit_codes():
            run(_validated(section, {name: value for name, value in values.items() if _is_given(ctx, name)}))

    hints = get_type_hints(section, include_extras=True)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.get_default(),
            annotation=hints[name],
        )
        for name, field in section.model_fields.items()
    ]
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    verb.__signature__ = inspect.Signature([context, *options])  # type: ignore[attr-defined]
    verb.__doc__ = run.__doc__
    return verb


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _validated(section: type[OptionsT], given: dict[str, Any]) -> OptionsT:
    try:
        return section(**given)
    except ValidationError as error:
        # What typer lets pass, and a section does not.
        found = error.errors(include_url=False)[0]
        flag = str(found["loc"][0]).replace("_", "-") if found["loc"] else "options"
        expected = "expected a finite number" if found["type"] == "finite_number" else found["msg"]
        raise ConfigError(f"--{flag} is {found['input']}; {expected}") from None
