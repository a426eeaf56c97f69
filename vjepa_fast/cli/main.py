"""Entry point of `vjepa-fast` and `python -m vjepa_fast`."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vjepa_fast import __version__

VERBS = {
    "train": "Pretrain from a recipe or a config file. With nothing else: the demo, on videos that it makes itself.",
    "pack": "Keep videos as JPEG frames in WebDataset shards, which training reads at a fraction of the videos' "
    "CPU time.",
    "convert": "Convert V-JEPA weights between Meta's layout, Hugging Face's and ours, and prove that they are the "
    "same.",
    "embed": "Write the features of videos, one entry a video; the same command resumes a stopped job.",
    "probe": "Fit probes on the features of a frozen encoder, and measure what they read out of new videos.",
    "doctor": "Say what is installed, which kernels are used, and why others are not. Exit code 1 if something is "
    "broken.",
    "masks": "Draw the masks of a training step over frames, and print how much each mask keeps. Needs no data.",
    "plan": "Print shapes, tokens, FLOPs, memory, time and cost of a config on a GPU. Needs neither data nor a GPU.",
    "bench": "Measure the training step, beside the reference's where there is one, and the loader. Writes JSON, "
    "Markdown, PNG.",
}
"""What each verb does, in the order of --help. The verb NAME is the function NAME of vjepa_fast.cli.NAME."""


class _Verbs(TyperGroup):
    """Lists all verbs, and imports the module of the one that is called: all of them take several times as long."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=text) for name, text in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and what is left of the arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(args[0]), rest


def load(name: str) -> Any:
    """The command of a verb."""
    module = importlib.import_module(f"vjepa_fast.cli.{name}")
    alone = typer.Typer(add_completion=False)
    alone.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, name))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="vjepa-fast",
    cls=_Verbs,
    help="Pretrain with V-JEPA, fast: the reference's configs, checkpoints and loss.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback is for whoever mends the program: plain, and without the values of local variables.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vjepa-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    """Run the command line and exit with its code."""
    # Before torch starts its threads: they wait for each other asleep. Awake, as OpenMP's default is, other busy
    # programs on the machine make a step several times slower (benchmarks/results/demo_cpu_2026-11-22.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(prog_name="vjepa-fast")
