"""`vjepa-fast bench`: our step, the reference's and the loader, measured on this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vjepa_fast.cli.config import load
from vjepa_fast.cli.console import exit_codes
from vjepa_fast.common.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

    from vjepa_fast.bench.workload import Workload

EPILOG = """
Examples:

  vjepa-fast bench

  vjepa-fast bench --reference ~/vjepa2 --size small

  vjepa-fast bench --recipe vitl16-256 --loader videos.csv --out results

  vjepa-fast bench --loader videos.csv --pack packs/videos

Exit codes: 0 done, 1 failed, 2 usage or config, 130 interrupted.
"""


class Size(str, Enum):
    """Workloads of vjepa_fast.bench.workload."""

    trial = "trial"
    tiny = "tiny"
    small = "small"
    base = "base"
    large = "large"


class Device(str, Enum):
    """Where to measure."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def bench(
    reference: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkout of facebookresearch/vjepa2, to run beside ours.")
    ] = None,
    loader: Annotated[
        str | None,
        typer.Option(
            metavar="MANIFEST",
            help="Videos (CSV, .npy, folder, glob) or a pack, to measure the loader on, by PyAV and DALI.",
        ),
    ] = None,
    pack: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="With --loader: a pack of those videos. Without it some of them "
            "are packed for the measurement (about 20 s and 256 MB at most) "
            "in the cache folder, and removed again.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    size: Annotated[
        Size | None, typer.Option(help="Default: large (ViT-L, 256 px, batch 24, bf16) on a GPU, tiny on a CPU.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="A recipe instead of a size.")] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps of each side.")] = 10,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=0.0, help="No more rounds after this time, a side and setting.")
    ] = 60.0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the results go. Default: benchmarks/results.")
    ] = None,
) -> None:
    """Measure the training step, beside the reference's where there is one, and the loader. Writes JSON, Markdown, PNG.

    Activation checkpointing is off in our step.
    """
    with exit_codes():
        if size is not None and recipe is not None:
            raise ConfigError("--size and --recipe are both given; give one")
        if pack is not None and loader is None:
            raise ConfigError("--pack is given without --loader; give the videos of the pack, or the pack to --loader")
        # Imported here: torch takes seconds, which --help need not wait for.
        import torch

        from vjepa_fast.bench.reference import check_checkout
        from vjepa_fast.bench.timing import ROOT, pick_device

        root = check_checkout(reference) if reference is not None else None
        if device is Device.cuda and not torch.cuda.is_available():
            raise UserError("--device cuda, but torch finds no GPU; vjepa-fast doctor says why")
        where = pick_device(device.value)
        if where.type == "cpu":
            why = "no GPU that torch can use" if device is Device.auto else "--device cpu"
            typer.echo(f"measuring the CPU ({why}); its figures say nothing about a GPU")
        folder = out or (ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()) / "benchmarks" / "results"
        # Before minutes of measuring.
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        report = _measure(_workload(size, recipe, where), where, root, loader, pack, rounds, seconds)
        # A result may be published: where things lie on this machine is nobody's business.
        for path, name in ((reference, "DIR"), (loader, "MANIFEST"), (pack, "DIR"), (out, "DIR")):
            if path is not None:
                command = report["environment"]["command"].split(" ")
                report["environment"]["command"] = " ".join(name if word == str(path) else word for word in command)
        for path in _write(report, folder):
            typer.echo(f"wrote {path}")


def _workload(size: Size | None, recipe: str | None, device: torch.device) -> Workload:
    from vjepa_fast.bench import workload

    if recipe is not None:
        return workload.of_config(recipe, load(recipe, None, ["model.use_activation_checkpointing=false"]))
    chosen = size or (Size.large if device.type == "cuda" else Size.tiny)
    return {
        Size.trial: workload.TRIAL,
        Size.tiny: workload.TINY,
        Size.small: workload.SMALL,
        Size.base: workload.BASE,
        Size.large: workload.LARGE,
    }[chosen]


def _measure(
    workload: Workload,
    device: torch.device,
    root: Path | None,
    manifest: str | None,
    pack: str | None,
    rounds: int,
    budget_s: float,
) -> dict[str, Any]:
    from vjepa_fast.bench.compare import measure_step, reference_settings
    from vjepa_fast.bench.loader import add_need, describe_need, measure_loader
    from vjepa_fast.bench.timing import environment, limits_as_dict, measure_limits
    from vjepa_fast.bench.workload import TRIAL

    num_batches = min(8 if device.type == "cuda" else 2, rounds)
    report: dict[str, Any] = {"environment": environment(device)}
    if manifest is not None:
        # First, because it is the quickest to fail.
        report["loader"] = {"manifest": Path(manifest).name} | measure_loader(
            manifest, pack, workload.data, device, min(8, rounds), lambda text: typer.echo(f"loader: {text}")
        )
    limits = measure_limits(device, small=workload is TRIAL)
    report |= {"limits": limits_as_dict(limits), "workload": workload.as_dict()}
    report["step"] = measure_step(workload, device, limits, num_batches=num_batches, rounds=rounds, budget_s=budget_s)
    own = report["step"]["figures"]
    typer.echo(f"{workload.name}: {own['p50'] * 1e3:.1f} ms a step, {own['clips_per_s']:.2f} clips/s")
    graphed = report["step"].get("graphed")
    if graphed is not None:
        typer.echo(
            f"as CUDA graphs: {graphed['error']}"
            if "error" in graphed
            else f"as CUDA graphs: {graphed['p50'] * 1e3:.1f} ms a step, {graphed['clips_per_s']:.2f} clips/s"
        )
    if manifest is not None:
        rates = [own["clips_per_s"], (graphed or {}).get("clips_per_s", 0.0)]
        add_need(report["loader"], max(rates), device)
        for line in describe_need(report["loader"], device):
            typer.echo(f"loader: {line}")
    if root is not None:
        from vjepa_fast.bench.reference import REFERENCE_COMMIT

        report["reference_written_against"] = REFERENCE_COMMIT
        report["reference"] = {}
        for name, info in reference_settings(
            workload, device, root, limits, num_batches=num_batches, rounds=rounds, budget_s=budget_s
        ):
            report["reference"][name] = info
            typer.echo(
                f"{name}: {info['error']}"
                if "error" in info
                else f"{name}: {info['p50'] * 1e3:.1f} ms a step, {info['over_ours']['p50']:.2f} x our time"
            )
    report["load_average_after"] = os.getloadavg()[0]
    return report


def _write(report: dict[str, Any], folder: Path) -> list[Path]:
    from vjepa_fast.bench.report import as_markdown, draw

    about = report["environment"]
    hardware = "cpu" if about["device"].startswith("CPU") else about["device"]
    name = re.sub(r"[^a-z0-9]+", "_", f"{report['workload']['name']} {hardware}".lower()).strip("_")
    paths = [folder / f"bench_{name}_{about['date'][:10]}{suffix}" for suffix in (".json", ".md", ".png")]
    with _writing(folder):
        paths[0].write_text(json.dumps(report, indent=1) + "\n")
        paths[1].write_text(as_markdown(report))
        draw(report, paths[2])
    return paths


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; --out names another folder") from None
