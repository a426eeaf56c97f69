"""`vjepa-fast train`: pretrains from a recipe or a config file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vjepa_fast.cli.config import ConfigOption, RecipeOption, load
from vjepa_fast.cli.console import exit_codes
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import Config, dump, load_recipe, recipe_names, recipe_summary

EPILOG = """
Examples:

  vjepa-fast train  (the demo: about two minutes on two CPU cores)

  vjepa-fast train --list-recipes

  vjepa-fast train --recipe vitl16-256 data.datasets=videos.csv --nproc 8

  vjepa-fast train --config vitl16.yaml mask.masks.0.num_blocks=4 --out runs/b4

  torchrun --nproc-per-node 8 -m vjepa_fast train --config vitl16.yaml --out runs/vitl16

  srun vjepa-fast train --config vitl16.yaml --out runs/vitl16 --resume  (SLURM: one process a task)

  vjepa-fast train --config vitl16.yaml --submit partition=gpu,nodes=2,gpus_per_node=8,timeout_min=1440

  vjepa-fast train --config vitl16.yaml --print-config > resolved.yaml

  vjepa-fast train --resume  (continues the run in runs/demo)

Exit codes: 0 done, 1 failed, 2 usage or config, 130 interrupted, 143 preempted after a checkpoint was written.
"""


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            show_default=False,
            help="Dotted keys on top of the config, values in YAML: optimization.lr=1e-4. The reference's "
            "names (meta.seed=1) are accepted too. --print-config shows every key.",
        ),
    ] = None,
    recipe: RecipeOption = None,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Print a table of the packaged recipes, and stop.")
    ] = False,
    config: ConfigOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder; the same as train.out=DIR.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run folder.")] = False,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Training processes on this machine, one a GPU.")] = 1,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Stop after N steps; the schedules keep their length.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole resolved config as YAML, and stop.")
    ] = False,
    submit: Annotated[
        str | None,
        typer.Option(
            "--submit",
            metavar="K=V,...",
            help="Run as a SLURM job that resumes by itself after its time limit: partition=gpu,nodes=2,"
            "gpus_per_node=8,timeout_min=1440. Or in the background of this machine: cluster=local.",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Record where the time of a few steps goes.")] = False,
) -> None:
    """Pretrain from a recipe or a config file. With nothing else: the demo, on videos that it makes itself."""
    with exit_codes():
        if list_recipes:
            _list_recipes()
            return
        changes = list(overrides or ())
        if out is not None:
            changes.append(f"train.out={json.dumps(str(out))}")
        if max_steps is not None:
            changes.append(f"train.max_steps={max_steps}")
        cfg = load(recipe, config, changes)
        if print_config:
            sys.stdout.write(dump(cfg))
            # Here a closed pipe is met by the command line; left to the end of the process it would be reported.
            sys.stdout.flush()
            return
        cfg.check_trainable()
        if submit is not None:
            _submit(cfg, submit, nproc, resume, profile)
            return
        # Imported here: torch takes seconds, which --help and --print-config need not wait for.
        from vjepa_fast.evaluation.demo import probe_run
        from vjepa_fast.train import launch_run

        code = launch_run.run(cfg, nproc=nproc, resume=resume, profile=profile, finish=probe_run)
    raise typer.Exit(code)


def _list_recipes() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "model", "pixels", "frames"):
        table.add_column(column, justify="right" if column in ("pixels", "frames") else "left", no_wrap=True)
    table.add_column("what it is")
    for name in recipe_names():
        cfg = load_recipe(name)
        height, width = cfg.data.crop_size
        pixels = str(height) if height == width else f"{height} x {width}"
        frames = ", ".join(map(str, sorted(set(cfg.data.dataset_fpcs))))
        table.add_row(name, cfg.model.model_name, pixels, frames, recipe_summary(name))
    # In a pipe, a line for each recipe.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def _submit(cfg: Config, text: str, nproc: int, resume: bool, profile: bool) -> None:
    from vjepa_fast.cli import submit

    if nproc > 1:
        raise ConfigError(
            "--nproc is for processes that this command starts; how many the job of --submit has, "
            "gpus_per_node or tasks_per_node says"
        )
    options = submit.parse(text)
    job, folder = submit.submit(cfg, options, resume, profile)
    typer.echo(
        f"job {job.job_id} of {submit.num_processes(options)} processes is submitted\n"
        f"run folder {folder}\noutput in {job.paths.stdout} and {job.paths.stderr}"
    )
