"""What --help says arrives whole."""

from __future__ import annotations

import pytest
import typer.main
from rich.text import Text

from vjepa_fast.cli.main import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", COMMANDS)
def test_nothing_is_taken_for_markup(verb: str) -> None:
    """Rich takes lower-case words in square brackets for styles, and leaves them out."""
    command = COMMANDS[verb]
    for text in [command.help, *(getattr(param, "help", None) for param in command.params)]:
        assert Text.from_markup(text or "").plain == (text or "")
