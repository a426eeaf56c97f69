"""What --help says arrives whole, and is said by the verb itself."""

from __future__ import annotations

import pytest
from rich.text import Text
from typer.testing import CliRunner

from vjepa_fast.cli.main import VERBS, app, load


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_taken_for_markup(verb: str) -> None:
    """Rich takes lower-case words in square brackets for styles, and leaves them out."""
    command = load(verb)
    for text in [command.help, *(getattr(param, "help", None) for param in command.params)]:
        assert Text.from_markup(text or "").plain == (text or "")


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_says_what_each_says_of_itself(verb: str) -> None:
    assert VERBS[verb] == load(verb).help.split("\n\n")[0].replace("\n", " ")


def test_every_verb_is_listed_and_found() -> None:
    listed = CliRunner().invoke(app, ["--help"]).output
    for verb in VERBS:
        assert f" {verb} " in listed
        result = CliRunner().invoke(app, [verb, "-h"])
        assert result.exit_code == 0 and f"Usage: vjepa-fast {verb}" in result.output


def test_the_nearest_verb_is_named() -> None:
    result = CliRunner().invoke(app, ["prob"])
    assert result.exit_code == 2 and "'probe'" in result.output
