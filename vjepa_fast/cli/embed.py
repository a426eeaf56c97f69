"""`vjepa-fast embed`: computes features of videos with a pretrained encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vjepa_fast.cli.console import say
from vjepa_fast.cli.convert import ModelConfigOption, apply_config, fields
from vjepa_fast.cli.model_options import (
    CheckpointOption,
    DeviceOption,
    FpsOption,
    FramesOption,
    SetOption,
    SizeOption,
    WeightsOption,
    WorkersOption,
    usable_device,
)
from vjepa_fast.cli.options import command
from vjepa_fast.common.errors import UserError
from vjepa_fast.common.progress_bar import Bar
from vjepa_fast.config.sections.base import Section

if TYPE_CHECKING:
    from torch import Tensor

    from vjepa_fast.inference.model import InferenceModel
    from vjepa_fast.inference.videos import EmbedJob

EPILOG = """
Examples:

  vjepa-fast embed video.mp4 --checkpoint runs/run --out features.safetensors

  vjepa-fast embed videos.csv --checkpoint vitl.pt --out features.npz --pool mean --fps 4

  vjepa-fast embed 'videos/**/*.mp4' --checkpoint vitl-hf --out features.safetensors --dtype bfloat16 --batch-size 16

After Ctrl-C, kill -9 or a full disk, run the same command to continue where it stopped.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""


class EmbedOptions(Section):
    """Which videos, with which model, how. Each field is an option, with the help that it shows."""

    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO...",
            show_default=False,
            help="Videos and images: files, folders, globs, CSV or .npy manifests, packs.",
        ),
    ]
    checkpoint: CheckpointOption
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", show_default=False, help="New: .safetensors or .npz, with an entry a video under its path."
        ),
    ]
    pool: Annotated[
        Literal["none", "mean"], typer.Option(help="none: all tokens, [N, D]; mean: their average, [D].")
    ] = "none"
    frames: FramesOption = None
    fps: FpsOption = None
    size: SizeOption = None
    clips: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Clips of a video: the middle one, or several spread evenly; the first "
            "dimension of the features is then the clip.",
        ),
    ] = 1
    weights: WeightsOption = None
    config: ModelConfigOption = None
    device: DeviceOption = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the computation and of the features.")
    ] = "float32"
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Clips encoded together.", show_default="1 on a CPU, 8 on a GPU"
        ),
    ] = None
    workers: WorkersOption = None
    option: SetOption = None


def _run(options: EmbedOptions) -> None:
    """Write the features of videos, one entry a video; the same command resumes a stopped job."""
    # Imported here: they need seconds, which --help need not wait for.
    from vjepa_fast.checkpoints.open import open_checkpoint
    from vjepa_fast.inference.loading import build
    from vjepa_fast.inference.videos import EmbedJob, default_sampling, list_videos

    device = usable_device(options.device)
    found = list_videos(options.videos)
    opened = apply_config(open_checkpoint(options.checkpoint), options.config)
    overrides = fields(options.option or [], "--set")
    model = build(opened, weights=options.weights, dtype=options.dtype, predictor=False, overrides=overrides)
    for note in model.assumed:
        say("warning", note)
    stat = opened.path.stat()
    file = hashlib.sha256(f"{opened.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    job = EmbedJob(
        found,
        options.out,
        default_sampling(model, options.frames, options.fps, options.size, options.clips),
        {"checkpoint": f"{opened.path}:{file}", "weights": model.weights, "pool": options.pool, "dtype": options.dtype},
    )
    first = _embed(options, model, job, device)
    _warn_of_broken(job)
    if first is None:
        raise UserError(f"none of the {job.progress.total} videos could be read; {options.out} was not written")
    typer.echo(_describe(options, job, first, model.weights))


embed = command(EmbedOptions, _run)


def _embed(options: EmbedOptions, model: InferenceModel, job: EmbedJob, device: Any) -> Tensor | None:
    """Runs the job, and says so if it is stopped."""
    from vjepa_fast.data.workers import auto_num_workers

    pool: Literal["mean"] | None = "mean" if options.pool == "mean" else None
    bar = Bar("embedded", "videos", job.progress.total, job.progress.done)
    try:
        # On the GPU only once the decoding processes are there: they are forked, which CUDA does not survive.
        return job.run(
            lambda: model.to(device),
            lambda loaded, clips: loaded.encode(clips, pool=pool),
            options.batch_size or (8 if device.type == "cuda" else 1),
            options.workers or max(1, auto_num_workers(device)),
            lambda now: bar.show(now.done, f"{now.broken} broken"),
        )
    except KeyboardInterrupt:
        bar.close()
        say(
            "warning",
            f"{job.progress.done} of {job.progress.total} videos are done and kept; run the same command to continue",
        )
        raise
    finally:
        bar.close()


def _warn_of_broken(job: EmbedJob) -> None:
    broken = job.progress.broken
    if broken:
        path, reason = next(iter(job.broken.items()))
        say(
            "warning",
            f"{broken} of {job.progress.total} videos could not be read and were left out: {job.broken_list} "
            f"({path}: {reason}{', ...' if broken > 1 else ''})",
        )


def _describe(options: EmbedOptions, job: EmbedJob, first: Tensor, weights: str) -> str:
    import torch

    count = job.progress.total - job.progress.broken
    shape = " x ".join(map(str, first.shape))
    # NumPy has no bfloat16.
    kept = "float32" if options.out.suffix == ".npz" and first.dtype == torch.bfloat16 else options.dtype
    return f"{options.out}: {count} {'video' if count == 1 else 'videos'}, {shape} each, {kept}, of the {weights}"
