"""`vjepa-fast probe`: what the features of a frozen encoder know."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vjepa_fast.cli.console import exit_codes, say
from vjepa_fast.cli.convert import ModelConfigOption, apply_config, fields
from vjepa_fast.cli.model_options import DeviceOption, SetOption, WeightsOption, WorkersOption, usable_device
from vjepa_fast.cli.probe_labels import ProbeRun
from vjepa_fast.cli.probe_prediction import run_prediction
from vjepa_fast.common.errors import ConfigError

if TYPE_CHECKING:
    from vjepa_fast.inference.model import InferenceModel

EPILOG = """
Examples:

  vjepa-fast probe --checkpoint runs/run --train train.csv --val val.csv

  vjepa-fast probe --checkpoint vitl.pt --train ssv2_train.csv --val ssv2_val.csv --segments 2 --views 3 --depth 4
      --augmented 20 --frame-step 4 --dtype bfloat16

  vjepa-fast probe --checkpoint runs/run --train speeds.csv --val speeds_val.csv --probe linear --targets vx,vy

  vjepa-fast probe --checkpoint runs/run --val videos.csv --task horizon

A line of the manifests is "path label": a class number, or numbers to predict, as in "a.mp4 0.25,-1.5". Features are
computed once and kept; stopped by Ctrl-C, kill -9 or a full disk, the same command goes on where it was.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

KINDS = ("attentive", "linear", "knn")
_LRS, _DECAYS = "5e-3,3e-3,1e-3,3e-4,1e-4", "0.01,0.1,0.4,0.8"


def probe(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help="A run folder, a checkpoint or released weights of Meta's, a "
            ".safetensors file, or a folder of Hugging Face.",
        ),
    ],
    val: Annotated[str, typer.Option(metavar="CSV", show_default=False, help="Labelled videos to measure on.")],
    train: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            show_default=False,
            help="Labelled videos to fit probes on; horizon and surprise fit nothing.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("probe"),
    probes: Annotated[
        str,
        typer.Option(
            "--probe",
            metavar="KINDS",
            help="attentive, linear (ridge regression on mean features), knn (nearest "
            "neighbours of mean features), separated by commas.",
        ),
    ] = ",".join(KINDS),
    task: Annotated[
        Literal["auto", "classification", "regression", "horizon", "surprise"],
        typer.Option(
            help="auto: classification if all labels are whole numbers, else regression. horizon: error of predicted "
            "future features by how far ahead. surprise: whether videos of label 1 are predicted worse than those of "
            "label 0."
        ),
    ] = "auto",
    targets: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names of the columns of a regression, separated by commas.")
    ] = None,
    eval_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Meta's YAML of a video classification, for whatever is not said here: clips, probes, schedules.",
        ),
    ] = None,
    segments: Annotated[
        int, typer.Option(metavar="N", min=1, help="Clips of a video in time, whose tokens a probe sees together.")
    ] = 1,
    views: Annotated[
        int, typer.Option(metavar="N", min=1, help="Crops of a validation clip, whose answers are averaged.")
    ] = 1,
    augmented: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Versions of each training video with the reference's augmentations, seen in turn, "
            "epoch by epoch; 0: the plain clip.",
        ),
    ] = 0,
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
    frame_step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="In place of --fps: every Nth frame, as Meta's evaluations have it (4).",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Frames of a clip that horizon and surprise see; the others are predicted.",
            show_default="half",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Clip frames from one window of a video to the next, for horizon and surprise.",
            show_default="one window; half a window for surprise",
        ),
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs",
            help="For surprise: every two lines of the manifest are a possible and an impossible version of the same.",
        ),
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(
            metavar="PX", min=1, help="Height and width of a clip.", show_default="those of the checkpoint, else 256"
        ),
    ] = None,
    out_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Blocks of the encoder, from 0, whose tokens a probe sees together.",
            show_default="the last",
        ),
    ] = None,
    depth: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Blocks of an attentive probe, the last one cross-attention: 1 in V-JEPA 1, 4 in V-JEPA 2.",
        ),
    ] = 1,
    probe_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Attention heads of an attentive probe.",
            show_default="16, or the encoder's with --style vjepa1 or where 16 does not divide its width",
        ),
    ] = None,
    lr: Annotated[
        str, typer.Option(metavar="LIST", help="Learning rates; with every weight decay a probe, all trained at once.")
    ] = _LRS,
    weight_decay: Annotated[str, typer.Option(metavar="LIST", help="Weight decays.")] = _DECAYS,
    warmup: Annotated[float, typer.Option(metavar="EPOCHS", min=0, help="Epochs in which lr rises from 0.")] = 0.0,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the training videos.")] = 20,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Videos of a step of attentive probes.",
            show_default="an eighth of the training videos, 4 to 64",
        ),
    ] = None,
    style: Annotated[
        Literal["vjepa2", "vjepa1"],
        typer.Option(help="vjepa1: biases and norms without weight decay, gradients clipped to a norm of 1."),
    ] = "vjepa2",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of weights, order and augmentations.")] = 0,
    weights: WeightsOption = None,
    config: ModelConfigOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Of the encoder, of kept features, and of products in attentive probes."),
    ] = "float32",
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where features are kept.", show_default="~/.cache/vjepa_fast/features"),
    ] = None,
    encoder_batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Clips encoded together.", show_default="1 on a CPU, 8 on a GPU"),
    ] = None,
    workers: WorkersOption = None,
    option: SetOption = None,
) -> None:
    """Fit probes on the features of a frozen encoder, and measure what they read out of new videos."""
    with exit_codes():
        kinds = _names(probes, "--probe", KINDS)
        grid = None
        if eval_config is not None:
            from vjepa_fast.evaluation.eval_yaml import read_eval_yaml

            said = read_eval_yaml(eval_config)
            # What is given on the command line counts more.
            free = {name: value for name, value in said.options.items() if _is_default(ctx, name)}
            if _is_default(ctx, "lr") and _is_default(ctx, "weight_decay") and _is_default(ctx, "warmup"):
                grid = said.heads
            segments, views = free.get("segments", segments), free.get("views", views)
            frames, size, depth = free.get("frames", frames), free.get("size", size), free.get("depth", depth)
            frame_step = free.get("frame_step", frame_step) if fps is None else None
            probe_heads, epochs = free.get("probe_heads", probe_heads), free.get("epochs", epochs)
            batch_size, style = free.get("batch_size", batch_size), free.get("style", style)
            out_layers, weights = free.get("out_layers", out_layers), free.get("weights", weights)
            for note in said.notes:
                if not (augmented and "--augmented" in note):
                    say("warning", note)
        rates, decays = _numbers(lr, "--lr"), _numbers(weight_decay, "--weight-decay")
        if fps is not None and frame_step is not None:
            raise ConfigError("--fps and --frame-step are given; expected one of them")
        from vjepa_fast.evaluation.report import RESULTS

        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out} is a file; expected a folder, or the name of a new one")
        if (out / RESULTS).exists():
            raise ConfigError(f"{out / RESULTS} exists; give another --out or remove it")
        # Imported here: they need seconds, which --help need not wait for.

        from vjepa_fast.checkpoints.open import open_checkpoint
        from vjepa_fast.data.workers import auto_num_workers
        from vjepa_fast.evaluation.attentive_probe import HeadSetting
        from vjepa_fast.evaluation.labels import read_labels
        from vjepa_fast.evaluation.prediction import Prediction, load_encoders
        from vjepa_fast.evaluation.run_probes import ProbeSettings
        from vjepa_fast.inference.model import build
        from vjepa_fast.inference.videos import list_videos

        target = usable_device(device)
        opened = apply_config(open_checkpoint(checkpoint), config)
        overrides = fields(option or [], "--set")
        batch = encoder_batch or (8 if target.type == "cuda" else 1)
        num_workers = workers or max(1, auto_num_workers(target))
        if task in ("horizon", "surprise"):
            videos = list_videos([val], one_label=task == "surprise")
            encoders = load_encoders(opened, dtype, overrides)
            for note in encoders[0].assumed:
                say("warning", note)
            rule = _rule(encoders[0], frames, fps, frame_step, size, 1, 1)
            pair = Prediction.of(*encoders, rule.frames, context)
            run_prediction(
                task,
                pair,
                val,
                videos,
                rule,
                stride,
                pairs,
                target,
                batch,
                num_workers,
                out,
                {"checkpoint": str(opened.path), "dtype": dtype, "device": str(target)},
            )
            return
        if train is None:
            raise ConfigError("--train is missing; expected labelled videos to fit probes on")
        asked = task if task in ("classification", "regression") else None
        labels = read_labels(train, val, asked, targets.split(",") if targets else ())
        for note in labels.notes:
            say("warning", note)
        if augmented and labels.task == "regression":
            say(
                "warning",
                "augmented clips are cropped, sheared and shifted: numbers that say where something is in "
                "the picture no longer fit them",
            )
        model = build(opened, weights=weights, dtype=dtype, predictor=False, overrides=overrides)
        for note in model.assumed:
            say("warning", note)
        width = model.encoder.embed_dim
        if probe_heads is None:
            probe_heads = 16 if width % 16 == 0 and style == "vjepa2" else model.encoder.num_heads
        if width % probe_heads:
            raise ConfigError(f"--probe-heads is {probe_heads}; expected a divisor of the encoder's width, {width}")
        heads = grid or [
            HeadSetting(
                rate,
                decay,
                0.0 if warmup else None,
                warmup=warmup,
                final_weight_decay=1e-6 if style == "vjepa1" else None,
            )
            for decay, rate in itertools.product(decays, rates)
        ]
        if batch_size is None:
            batch_size = max(4, min(64, len(labels.train.videos.paths) // 8))
        settings = ProbeSettings(
            heads,
            depth,
            probe_heads,
            epochs,
            batch_size,
            style == "vjepa2",
            1.0 if style == "vjepa1" else None,
            augmented,
            seed,
        )
        run = ProbeRun(model, labels, settings, target, out)
        rule = _rule(model, frames, fps, frame_step, size, segments, views, _layers(model, out_layers))
        run.features(cache, rule, kinds, batch, num_workers)
        run.probe(
            kinds, {"checkpoint": str(opened.path), "weights": model.weights, "dtype": dtype, "command": sys.argv[1:]}
        )


def _rule(
    model: InferenceModel,
    frames: int | None,
    fps: float | None,
    frame_step: int | None,
    size: int | None,
    segments: int,
    views: int,
    layers: tuple[int, ...] | None = None,
) -> Any:
    from vjepa_fast.evaluation.views import ClipRule
    from vjepa_fast.inference.videos import default_sampling

    sampling = default_sampling(model, frames, fps, size, 1)
    return ClipRule(
        sampling.frames, None if frame_step else sampling.fps, frame_step, sampling.size, segments, views, layers=layers
    )


def _is_default(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"


def _layers(model: InferenceModel, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    import torch

    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--out-layers is {text!r}; expected whole numbers, separated by commas") from None
    encoder = model.encoder
    try:
        model.encode(
            torch.zeros(1, encoder.tubelet_size, encoder.patch_size, encoder.patch_size, 3, dtype=torch.uint8), layers
        )
    except ValueError as error:
        raise ConfigError(f"--out-layers is {text!r}: {error}") from None
    return layers


def _names(text: str, flag: str, known: tuple[str, ...]) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or any(name not in known for name in found):
        raise ConfigError(f"{flag} is {text!r}; expected one or several of {', '.join(known)}, separated by commas")
    return [name for name in known if name in found]


def _numbers(text: str, flag: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < float("inf") for number in found):
        raise ConfigError(f"{flag} is {text!r}; expected numbers of at least 0, separated by commas")
    return list(dict.fromkeys(found))
