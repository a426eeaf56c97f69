"""The options of `vjepa-fast probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vjepa_fast.cli.convert import ModelConfigOption
from vjepa_fast.cli.model_options import (
    CheckpointOption,
    DeviceOption,
    FpsOption,
    FramesOption,
    SetOption,
    SizeOption,
    WeightsOption,
    WorkersOption,
)
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.messages import suggest
from vjepa_fast.config.sections.base import Section
from vjepa_fast.evaluation.probes import BUILT_IN, names


def _listed() -> str:
    return ", ".join(f"{name} ({one.summary})" for name, one in BUILT_IN.items())


class ProbeOptions(Section):
    """What is measured, on which videos, how. Each field is an option, with the help that it shows."""

    checkpoint: CheckpointOption
    val: Annotated[str, typer.Option(metavar="CSV", show_default=False, help="Labelled videos to measure on.")]
    train: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            show_default=False,
            help="Labelled videos to fit probes on; horizon and surprise fit nothing.",
        ),
    ] = None
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("probe")
    probes: Annotated[str, typer.Option("--probe", metavar="KINDS", help=f"{_listed()}, separated by commas.")] = (
        ",".join(BUILT_IN)
    )
    task: Annotated[
        Literal["auto", "classification", "regression", "horizon", "surprise"],
        typer.Option(
            help="auto: classification if all labels are whole numbers, else regression. horizon: error of predicted "
            "future features by how far ahead. surprise: whether videos of label 1 are predicted worse than those of "
            "label 0."
        ),
    ] = "auto"
    targets: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names of the columns of a regression, separated by commas.")
    ] = None
    eval_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Meta's YAML of a video classification, for whatever is not said here: clips, probes, schedules.",
        ),
    ] = None
    segments: Annotated[
        int, typer.Option(metavar="N", min=1, help="Clips of a video in time, whose tokens a probe sees together.")
    ] = 1
    views: Annotated[
        int, typer.Option(metavar="N", min=1, help="Crops of a validation clip, whose answers are averaged.")
    ] = 1
    augmented: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Versions of each training video with the reference's augmentations, seen in turn, "
            "epoch by epoch; 0: the plain clip.",
        ),
    ] = 0
    frames: FramesOption = None
    fps: FpsOption = None
    frame_step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="In place of --fps: every Nth frame, as Meta's evaluations have it (4).",
            show_default=False,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Frames of a clip that horizon and surprise see; the others are predicted.",
            show_default="half",
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Clip frames from one window of a video to the next, for horizon and surprise.",
            show_default="one window; half a window for surprise",
        ),
    ] = None
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs",
            help="For surprise: every two lines of the manifest are a possible and an impossible version of the same.",
        ),
    ] = False
    size: SizeOption = None
    out_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Blocks of the encoder, from 0, whose tokens a probe sees together.",
            show_default="the last",
        ),
    ] = None
    depth: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Blocks of an attentive probe, the last one cross-attention: 1 in V-JEPA 1, 4 in V-JEPA 2.",
        ),
    ] = 1
    probe_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Attention heads of an attentive probe.",
            show_default="16, or the encoder's with --style vjepa1 or where 16 does not divide its width",
        ),
    ] = None
    lr: Annotated[
        str, typer.Option(metavar="LIST", help="Learning rates; with every weight decay a probe, all trained at once.")
    ] = "5e-3,3e-3,1e-3,3e-4,1e-4"
    weight_decay: Annotated[str, typer.Option(metavar="LIST", help="Weight decays.")] = "0.01,0.1,0.4,0.8"
    warmup: Annotated[float, typer.Option(metavar="EPOCHS", min=0, help="Epochs in which lr rises from 0.")] = 0.0
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the training videos.")] = 20
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Videos of a step of attentive probes.",
            show_default="an eighth of the training videos, 4 to 64",
        ),
    ] = None
    style: Annotated[
        Literal["vjepa2", "vjepa1"],
        typer.Option(help="vjepa1: biases and norms without weight decay, gradients clipped to a norm of 1."),
    ] = "vjepa2"
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of weights, order and augmentations.")] = 0
    weights: WeightsOption = None
    config: ModelConfigOption = None
    device: DeviceOption = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Of the encoder, of kept features, and of products in attentive probes."),
    ] = "float32"
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where features are kept.", show_default="~/.cache/vjepa_fast/features"),
    ] = None
    encoder_batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Clips encoded together.", show_default="1 on a CPU, 8 on a GPU"),
    ] = None
    workers: WorkersOption = None
    option: SetOption = None

    def kinds(self) -> list[str]:
        """Names of the probes, each once, in the order in which --help has them.

        Raises:
            ConfigError: there is no such probe.
        """
        known = names()
        found = [name.strip() for name in self.probes.split(",") if name.strip()]
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            hint = suggest(unknown[0], tuple(known)) if unknown else ""
            raise ConfigError(
                f"--probe is {self.probes!r}; expected one or several of {', '.join(known)}, separated by commas{hint}"
            )
        return [name for name in known if name in found]

    def rates(self) -> tuple[list[float], list[float]]:
        """Learning rates and weight decays, each once.

        Raises:
            ConfigError: they are no numbers.
        """
        return _numbers(self.lr, "--lr"), _numbers(self.weight_decay, "--weight-decay")

    def layers(self) -> tuple[int, ...] | None:
        """Blocks of --out-layers.

        Raises:
            ConfigError: they are no whole numbers.
        """
        if self.out_layers is None:
            return None
        try:
            return tuple(int(part) for part in self.out_layers.split(","))
        except ValueError:
            raise ConfigError(
                f"--out-layers is {self.out_layers!r}; expected whole numbers, separated by commas"
            ) from None

    def check(self, results: str) -> None:
        """What can be said before a checkpoint is opened.

        Args:
            results: name of the file that a finished folder has.

        Raises:
            ConfigError: options contradict each other, or --out has results.
        """
        if self.fps is not None and self.frame_step is not None:
            raise ConfigError("--fps and --frame-step are given; expected one of them")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file; expected a folder, or the name of a new one")
        if (self.out / results).exists():
            raise ConfigError(f"{self.out / results} exists; give another --out or remove it")


def _numbers(text: str, flag: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < float("inf") for number in found):
        raise ConfigError(f"{flag} is {text!r}; expected numbers of at least 0, separated by commas")
    return list(dict.fromkeys(found))
