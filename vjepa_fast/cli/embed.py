"""`vjepa-fast embed`: features of videos by a pretrained encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vjepa_fast.cli.bar import Bar
from vjepa_fast.cli.console import exit_codes, say
from vjepa_fast.cli.convert import ModelConfigOption, apply_config, fields
from vjepa_fast.cli.model_options import DeviceOption, SetOption, WeightsOption, WorkersOption, usable_device
from vjepa_fast.common.errors import UserError

EPILOG = """
Examples:

  vjepa-fast embed video.mp4 --checkpoint runs/run --out features.safetensors

  vjepa-fast embed videos.csv --checkpoint vitl.pt --out features.npz --pool mean --fps 4

  vjepa-fast embed 'videos/**/*.mp4' --checkpoint vitl-hf --out features.safetensors --dtype bfloat16 --batch-size 16

Stopped by Ctrl-C, kill -9 or a full disk, the same command goes on where it was.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""


def embed(
    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO...",
            show_default=False,
            help="Videos and images: files, folders, globs, CSV or .npy manifests, packs.",
        ),
    ],
    checkpoint: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help="A run folder, a checkpoint or released weights of Meta's, a "
            ".safetensors file, or a folder of Hugging Face.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", show_default=False, help="New: .safetensors or .npz, with an entry a video under its path."
        ),
    ],
    pool: Annotated[
        Literal["none", "mean"], typer.Option(help="none: all tokens, [N, D]; mean: their average, [D].")
    ] = "none",
    frames: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Frames of a clip.", show_default="those of the checkpoint, else 16"),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="F", min=0.001, help="Frames a second of a clip.", show_default="that of the checkpoint, else 4"
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            metavar="PX", min=1, help="Height and width of a clip.", show_default="those of the checkpoint, else 256"
        ),
    ] = None,
    clips: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Clips of a video: the middle one, or several spread evenly; the first "
            "dimension of the features is then the clip.",
        ),
    ] = 1,
    weights: WeightsOption = None,
    config: ModelConfigOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the computation and of the features.")
    ] = "float32",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Clips encoded together.", show_default="1 on a CPU, 8 on a GPU"
        ),
    ] = None,
    workers: WorkersOption = None,
    option: SetOption = None,
) -> None:
    """Write the features of videos, one entry a video; stopped, the same command goes on."""
    with exit_codes():
        # Imported here: they need seconds, which --help need not wait for.
        import torch

        from vjepa_fast.checkpoints.open import open_checkpoint
        from vjepa_fast.data.workers import auto_num_workers
        from vjepa_fast.inference.model import InferenceModel, build
        from vjepa_fast.inference.videos import EmbedJob, default_sampling, list_videos

        target = usable_device(device)
        found = list_videos(videos)
        opened = apply_config(open_checkpoint(checkpoint), config)
        model = build(opened, weights=weights, dtype=dtype, predictor=False, overrides=fields(option or [], "--set"))
        for note in model.assumed:
            say("warning", note)
        stat = opened.path.stat()
        file = hashlib.sha256(f"{opened.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
        job = EmbedJob(
            found,
            out,
            default_sampling(model, frames, fps, size, clips),
            {"checkpoint": f"{opened.path}:{file}", "weights": model.weights, "pool": pool, "dtype": dtype},
        )

        def encode(loaded: InferenceModel, batch: Any) -> Any:
            return loaded.encode(batch, pool="mean" if pool == "mean" else None)

        bar = Bar("embedded", "videos", job.progress.total, job.progress.done)
        try:
            # On the GPU only once the decoding processes are there: they are forked, which CUDA does not survive.
            first = job.run(
                lambda: model.to(target),
                encode,
                batch_size or (8 if target.type == "cuda" else 1),
                workers or max(1, auto_num_workers(target)),
                lambda now: bar.show(now.done, f"{now.broken} broken"),
            )
        except KeyboardInterrupt:
            bar.close()
            say(
                "warning",
                f"{job.progress.done} of {job.progress.total} videos are done and kept; the same command goes on",
            )
            raise
        finally:
            bar.close()
        total, broken = job.progress.total, job.progress.broken
        if broken:
            path, reason = next(iter(job.broken.items()))
            say(
                "warning",
                f"{broken} of {total} videos could not be read and were left out: {job.broken_list} "
                f"({path}: {reason}{', ...' if broken > 1 else ''})",
            )
        if first is None:
            raise UserError(f"none of the {total} videos could be read; {out} was not written")
        shape = " x ".join(map(str, first.shape))
        # NumPy has no bfloat16.
        kept = "float32" if out.suffix == ".npz" and first.dtype == torch.bfloat16 else dtype
        typer.echo(
            f"{out}: {total - broken} {'video' if total - broken == 1 else 'videos'}, {shape} each, {kept}, "
            f"of the {model.weights}"
        )
