"""Messages on stderr and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from vjepa_fast.common.errors import UserError
from vjepa_fast.distributed.launchers import is_first_here

INTERRUPTED = 130


def say(level: str, message: str) -> None:
    """One `level: message` on stderr; the message is printed as it is, whatever brackets it holds.

    Of the processes that torchrun or srun started on a machine only the first says it.
    """
    if not is_first_here():
        return
    style = "bold red" if level == "error" else "bold yellow"
    Console(stderr=True, highlight=False).print(Text.assemble((f"{level}:", style), f" {message}"), soft_wrap=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """A UserError becomes its message and its exit code, Ctrl-C becomes 130; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        say("error", str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        say("error", "interrupted")
        raise typer.Exit(INTERRUPTED) from None
