"""Options shared by the verbs that use a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vjepa_fast.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

CheckpointOption = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        show_default=False,
        help="A run folder, a checkpoint or released weights of Meta's, a "
        ".safetensors file, or a folder of Hugging Face.",
    ),
]
FramesOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Frames of a clip.", show_default="those of the checkpoint, else 16"),
]
FpsOption = Annotated[
    float | None,
    typer.Option(
        metavar="F", min=0.001, help="Frames a second of a clip.", show_default="that of the checkpoint, else 4"
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="PX", min=1, help="Height and width of a clip.", show_default="those of the checkpoint, else 256"
    ),
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="target_encoder or ema_encoder (the teacher), encoder (the student).",
        show_default="the teacher if there is one; of a run on pixels the student",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Decoding processes.", show_default="by the cores there are")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A field of the model that the file does not say and shapes do not tell, as in num_heads=12.",
        show_default=False,
    ),
]


def usable_device(name: str) -> torch.device:
    """What --device means here.

    Raises:
        ConfigError: it asks for a GPU that is not there.
    """
    # Imported here: it needs seconds, which --help need not wait for.
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds no usable GPU (torch.cuda.is_available() is false)")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
