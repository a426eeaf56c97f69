"""`vjepa-fast plan`: predicts what a config costs on a named GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vjepa_fast.cli.config import ConfigOption, Overrides, RecipeOption, load
from vjepa_fast.cli.console import exit_codes
from vjepa_fast.common.errors import ConfigError

if TYPE_CHECKING:
    from vjepa_fast.cost.gpus import Gpu

EPILOG = """
Examples:

  vjepa-fast plan --recipe vitl16-256 --gpu h200

  vjepa-fast plan --recipe vitg16-256 --gpu h100 --gpus 128 --price 2.5 optimization.epochs=100

  vjepa-fast plan --recipe vith16-256 --gpu a100-80gb --gpus 8 --videos 2000000 train.shard_optimizer=true

  vjepa-fast plan --recipe vitl16-256 --gpu h100 --nodes 8 --gpus-per-node 8 --link ib400

  vjepa-fast plan --config vitl16.yaml --gpu rtx4090 data.batch_size=4 model.use_activation_checkpointing=true

Exit codes: 0 done, 1 failed, 2 usage or config, 130 interrupted.
"""


def plan(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="b200, h200, h100, a100-80gb, l40s, rtx4090, ...")] = "h200",
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="How many; each has its own batch.")] = 1,
    nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Machines; then the exchange between GPUs is printed too.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of each machine; 8 unless given.")
    ] = None,
    link: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Between machines: ib400 (an adapter a GPU), eth100 or eth25 (one a machine), nvlink (all "
            "in one domain), or adapters a machine and Gb/s of each, as in 8x400.",
        ),
    ] = "ib400",
    price: Annotated[
        float | None, typer.Option(metavar="X", min=0.0, help="Of one GPU for an hour; then the cost is printed.")
    ] = None,
    videos: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="In the data; then how long it takes to go through them.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured rates of this GPU: gpu_run.json of benchmarks.")
    ] = None,
    loader_rate: Annotated[
        float | None, typer.Option(metavar="X", min=0.001, help="Clips a second that the loader gives to one GPU.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="On plain PyTorch instead of our kernels.")] = False,
) -> None:
    """Print shapes, tokens, FLOPs, memory, time and cost of a config on a GPU. Needs neither data nor a GPU."""
    with exit_codes():
        cfg = load(recipe, config, list(overrides or ()))
        # Imported here: torch takes seconds, which --help need not wait for.
        from vjepa_fast.cost.communication import Cluster, as_table
        from vjepa_fast.cost.gpus import gpu_named
        from vjepa_fast.cost.plan import describe, draw_masks
        from vjepa_fast.cost.prediction import predict
        from vjepa_fast.train.step import TrainStep

        chosen = gpu_named(gpu)
        cluster = None
        if nodes is not None or gpus_per_node is not None:
            if gpus > 1:
                raise ConfigError("--gpus is --nodes times --gpus-per-node; leave it out")
            cluster = Cluster.of(chosen.name, nodes or 1, gpus_per_node or 8, link)
            gpus = cluster.num_gpus
        if rates is not None:
            chosen = _measured(chosen, rates)
        try:
            batch_size = cfg.data.per_process(gpus)
        except ValueError as error:
            raise ConfigError(f"{error}; --gpus says how many there are") from None
        steps = draw_masks(cfg, batch_size)
        prediction = predict(
            cfg, chosen, steps, plain_step=TrainStep if plain else None, loader_clips_per_s=loader_rate
        )
        typer.echo(describe(cfg, prediction, steps, num_gpus=gpus, price=price, num_videos=videos, kernels=not plain))
        if cluster is not None:
            typer.echo(f"\n{as_table(cfg, prediction, cluster)}")


def _measured(gpu: Gpu, path: Path) -> Gpu:
    from vjepa_fast.cost.gpus import with_measured

    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rates {path}: {error}; expected a JSON file of measured rates") from None
    if not isinstance(report, dict):
        raise ConfigError(f"--rates {path} holds no JSON object; expected a file as gpu_run writes it")
    return with_measured(gpu, report)
