"""Entry point of `vjepa-fast` and `python -m vjepa_fast`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vjepa_fast import __version__
from vjepa_fast.cli import bench, convert, doctor, embed, masks, pack, plan, probe, train

app = typer.Typer(
    name="vjepa-fast",
    help="Pretrain with V-JEPA, fast: the reference's configs, checkpoints and loss.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback is for whoever mends the program: plain, and without the values of local variables.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("pack", epilog=pack.EPILOG)(pack.pack)
app.command("convert", epilog=convert.EPILOG)(convert.convert)
app.command("embed", epilog=embed.EPILOG)(embed.embed)
app.command("probe", epilog=probe.EPILOG)(probe.probe)
app.command("doctor")(doctor.doctor)
app.command("masks", epilog=masks.EPILOG)(masks.masks)
app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("bench", epilog=bench.EPILOG)(bench.bench)


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
