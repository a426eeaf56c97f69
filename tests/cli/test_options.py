"""A section of options as a command: its signature, what the user gave, and what is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from vjepa_fast.cli.options import command
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.sections.base import Section


class Options(Section):
    place: Annotated[str, typer.Argument(metavar="PLACE")]
    need: Annotated[str, typer.Option()]
    speed: Annotated[float, typer.Option(metavar="F", min=0.5, help="How fast.")] = 4.0
    loud: Annotated[bool, typer.Option("--loud")] = False
    kind: Literal["a", "b"] = "a"
    words: Annotated[list[str] | None, typer.Option("--set", metavar="WORD")] = None


def run(*args: str, error: Exception | None = None) -> tuple[Any, list[Options]]:
    seen: list[Options] = []

    def verb(options: Options) -> None:
        """Moves something."""
        seen.append(options)
        if error is not None:
            raise error

    app = typer.Typer(add_completion=False)
    app.command()(command(Options, verb))
    return CliRunner().invoke(app, args), seen


def test_values_and_which_of_them_were_given() -> None:
    result, seen = run("here", "--need", "x", "--set", "one", "--set", "two", "--loud", "--kind", "a")
    assert result.exit_code == 0, result.output
    (options,) = seen
    assert options == Options(place="here", need="x", loud=True, words=["one", "two"])
    # A default that is given is given all the same.
    assert options.model_fields_set == {"place", "need", "words", "loud", "kind"}


def test_help_is_that_of_the_run_and_the_fields() -> None:
    text = run("--help")[0].output
    assert "Moves something." in text
    for part in ("--speed", "How fast.", "4.0", "--set", "PLACE"):
        assert part in text, text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("here",), "Missing option '--need'"),
        (("here", "--need", "x", "--speed", "0.1"), "0.5"),
        (("here", "--need", "x", "--kind", "c"), "'c' is not one of"),
        (("here", "--need", "x", "--speed", "inf"), "--speed is inf; expected a finite number"),
    ],
)
def test_what_is_refused(args: tuple[str, ...], message: str) -> None:
    result, seen = run(*args)
    assert result.exit_code == 2 and message in " ".join(result.output.split()) and not seen


def test_errors_of_the_user_are_their_message_and_exit_code() -> None:
    for error, code in ((UserError("it is broken"), 1), (ConfigError("it is wrong"), 2)):
        result, _ = run("here", "--need", "x", error=error)
        assert result.exit_code == code and str(error) in result.output and "Traceback" not in result.output
