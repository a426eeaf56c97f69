"""`vjepa-fast convert`: converts weights between layouts and verifies the result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vjepa_fast.cli.console import exit_codes, say
from vjepa_fast.common.errors import ConfigError, UserError

if TYPE_CHECKING:
    from vjepa_fast.checkpoints.open import Checkpoint, State
    from vjepa_fast.config.schema import ModelConfig

EPILOG = """
Examples:

  vjepa-fast convert vitl.pt vitl-hf --to hf

  vjepa-fast convert vitl.pt vitl-ssv2-hf --to hf --probe ssv2-vitl-16x2x3.pt

  vjepa-fast convert runs/run model.safetensors --to fast --weights target_encoder

  vjepa-fast convert vjepa2-vitl-fpc64-256 vitl.pt --to meta --reference ../vjepa2

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

_TOLERANCE = 1e-4
"""Norm of the difference over norm, of outputs of two libraries in fp32."""


ModelConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        show_default=False,
        help="The YAML file that the model was trained with, Meta's or ours, for what shapes do not tell.",
    ),
]


def convert(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            show_default=False,
            help="A checkpoint or released weights of Meta's, a run folder, a "
            ".safetensors file, or a folder of Hugging Face.",
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            show_default=False,
            help="What to write, new: a .pt file (meta), a .safetensors file or a folder (fast), a folder (hf).",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            show_default=False,
            help="Fields of the model that the file does not say and shapes "
            "do not tell, as in num_heads=12 or crop_size=384.",
        ),
    ] = None,
    to: Annotated[
        Literal["meta", "hf", "fast"],
        typer.Option(
            "--to",
            help="Meta's layout, Hugging Face's, or one .safetensors file with the config inside.",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="The encoder to take: target_encoder or ema_encoder (the teacher), encoder (the student).",
            show_default="the teacher if there is one; of a run on pixels the student",
        ),
    ] = None,
    config: ModelConfigOption = None,
    probe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A checkpoint of attentive probes to store with the encoder; for hf, the result is a "
            "VJEPA2ForVideoClassification.",
            show_default=False,
        ),
    ] = None,
    classifier: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Which of several probes in the file; from 0.", show_default=False),
    ] = None,
    probe_heads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Heads of the probe.", show_default="16, as in Meta's evaluations"),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A checkout of facebookresearch/jepa or vjepa2, whose modules are run on what was written for meta.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Read the result back and run it, in the other library too where that is installed.",
        ),
    ] = True,
) -> None:
    """Convert V-JEPA weights between Meta's layout, Hugging Face's and ours, and prove that they are the same."""
    with exit_codes():
        fields_given = fields(overrides or [], "SRC DST")
        if reference is not None and to != "meta":
            raise ConfigError(f"--reference runs Meta's modules on a file in Meta's layout; --to is {to}")
        # Imported here: torch takes seconds, which --help need not wait for.
        from vjepa_fast.checkpoints.export import write
        from vjepa_fast.checkpoints.open import open_checkpoint

        checkpoint = apply_config(open_checkpoint(src), config)
        if probe is not None:
            other = open_checkpoint(probe)
            if not other.classifiers:
                raise UserError(f"--probe: checkpoint {probe} holds no attentive probe (a key classifiers)")
            checkpoint.classifiers, checkpoint.probe_heads = other.classifiers, other.probe_heads
            checkpoint.labels = other.labels or checkpoint.labels
        chosen = _choose_classifier(checkpoint, classifier)
        key = checkpoint.choose(weights)
        cfg = _config(checkpoint, key, fields_given)
        _check_probe_width(checkpoint, cfg)
        if to == "hf":
            _warn_hf(checkpoint)
        if weights is not None:
            checkpoint.encoders = {key: checkpoint.encoders[key]}
        written = write(checkpoint, cfg, key, dst, to, probe=chosen, heads=probe_heads)
        typer.echo(f"{key} of {checkpoint.path} -> {written} ({_describe(cfg)})")
        if check:
            _check(checkpoint, key, chosen, written, to, reference)


def apply_config(checkpoint: Checkpoint, config: Path | None) -> Checkpoint:
    """The checkpoint with what a YAML file says of it; warnings about the file go to stderr."""
    from vjepa_fast.inference.loading import with_config

    if config is None:
        return checkpoint
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = with_config(checkpoint, config)
    for warning in caught:
        say("warning", str(warning.message))
    return checkpoint


def fields(overrides: list[str], where: str) -> dict[str, Any]:
    """Fields of the model from KEY=VALUE texts, values in YAML.

    Args:
        overrides: the texts.
        where: of the command line they stand, for messages.

    Raises:
        ConfigError: a text of another form.
    """
    from vjepa_fast.config.yaml_io import parse

    found = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"unexpected argument {text!r} after {where}; expected fields of the model as in num_heads=12"
            )
        found[name.removeprefix("model.")] = parse(value, f"override {text!r}")
    return found


def _choose_classifier(checkpoint: Checkpoint, given: int | None) -> int:
    """The number of the probe; the others are dropped if one is asked for."""
    count = len(checkpoint.classifiers)
    if given is None:
        return 0
    if given >= count:
        raise ConfigError(
            f"--classifier is {given}, but the file holds {count} attentive probes"
            + (f", 0 to {count - 1}" if count else "")
        )
    checkpoint.classifiers = [checkpoint.classifiers[given]]
    return 0


def _config(checkpoint: Checkpoint, key: str, fields: dict[str, Any]) -> ModelConfig:
    from vjepa_fast.inference.loading import check_fit, model_config

    cfg, assumed = model_config(checkpoint, key, fields)
    check_fit(checkpoint, key, cfg)
    for note in assumed:
        say("warning", note)
    return cfg


def _check_probe_width(checkpoint: Checkpoint, cfg: ModelConfig) -> None:
    from vjepa_fast.models.sizes import size_of

    width = size_of(cfg).embed_dim
    for state in checkpoint.classifiers:
        token = state.get("pooler.query_tokens")
        if token is not None and token.shape[-1] != width:
            raise UserError(
                f"the attentive probe has width {token.shape[-1]}, the encoder {width}: they do not belong together"
            )


def _warn_hf(checkpoint: Checkpoint) -> None:
    count = len(checkpoint.classifiers)
    if count > 1:
        raise ConfigError(
            f"the file holds {count} attentive probes and a Hugging Face folder one; choose it with "
            f"--classifier 0 to {count - 1}"
        )
    if checkpoint.action_predictor is not None:
        say("warning", "the action-conditioned predictor is left out: transformers has none")
    if checkpoint.predictor is None:
        say(
            "warning",
            "there is no predictor to write: transformers starts one at random, so call the model with "
            "skip_predictor=True",
        )


def _describe(cfg: ModelConfig) -> str:
    from vjepa_fast.models.sizes import size_of

    size = size_of(cfg)
    assert cfg.crop_size is not None
    return (
        f"width {size.embed_dim}, {size.depth} blocks, {size.num_heads} heads, {cfg.num_frames} frames of "
        f"{cfg.crop_size[0]} x {cfg.crop_size[1]}"
    )


def _check(checkpoint: Checkpoint, key: str, chosen: int, written: Path, to: str, reference: Path | None) -> None:
    from vjepa_fast.checkpoints.open import open_checkpoint
    from vjepa_fast.inference import verify

    again = open_checkpoint(written)
    pairs: list[tuple[str, State | None, State | None]] = [
        ("encoder", checkpoint.encoders[key], again.encoders[again.choose(key if key in again.encoders else None)]),
        ("predictor", checkpoint.predictor, again.predictor),
    ]
    probes = [checkpoint.classifiers[chosen]] if to == "hf" and checkpoint.classifiers else checkpoint.classifiers
    pairs += [
        (f"probe {number}", state, other)
        for number, (state, other) in enumerate(zip(probes, again.classifiers, strict=True))
    ]
    names = []
    for name, before, after in pairs:
        if before is not None:
            verify.assert_same_bits(name, before, after or {})
            names.append(name)
    typer.echo(f"weights read back: {', '.join(names)} equal to the bit")
    if to == "hf":
        try:
            differences = verify.against_hf(written)
        except ImportError:
            typer.echo("not run in transformers, which is not installed (pip install vjepa-fast[hf])")
            return
        _report("transformers", differences)
    elif reference is not None:
        _report(str(reference), verify.against_meta(written, reference))


def _report(where: str, differences: dict[str, float]) -> None:
    text = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    typer.echo(f"run on a random clip here and in {where}, relative difference: {text}")
    worst = max(differences.values())
    if not worst <= _TOLERANCE:
        raise UserError(
            f"the outputs differ by {worst:.1e}, more than {_TOLERANCE:g}; what was written is not to be "
            "relied on with this version of the other library"
        )
