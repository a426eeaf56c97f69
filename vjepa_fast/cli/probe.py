"""`vjepa-fast probe`: measures what the features of a frozen encoder encode."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from vjepa_fast.cli.console import say
from vjepa_fast.cli.convert import apply_config, fields
from vjepa_fast.cli.model_options import usable_device
from vjepa_fast.cli.options import command
from vjepa_fast.cli.probe_labels import ProbeRun
from vjepa_fast.cli.probe_options import ProbeOptions
from vjepa_fast.cli.probe_prediction import run_prediction
from vjepa_fast.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vjepa_fast.checkpoints.open import Checkpoint
    from vjepa_fast.evaluation.attentive_probe import HeadSetting
    from vjepa_fast.evaluation.labels import Labels
    from vjepa_fast.evaluation.probes import ProbeSettings
    from vjepa_fast.evaluation.views import ClipRule
    from vjepa_fast.inference.model import InferenceModel

EPILOG = """
Examples:

  vjepa-fast probe --checkpoint runs/run --train train.csv --val val.csv

  vjepa-fast probe --checkpoint vitl.pt --train ssv2_train.csv --val ssv2_val.csv --segments 2 --views 3 --depth 4
      --augmented 20 --frame-step 4 --dtype bfloat16

  vjepa-fast probe --checkpoint runs/run --train speeds.csv --val speeds_val.csv --probe linear --targets vx,vy

  vjepa-fast probe --checkpoint runs/run --val videos.csv --task horizon

A line of the manifests is "path label": a class number, or numbers to predict, as in "a.mp4 0.25,-1.5". Features are
computed once and kept; after Ctrl-C, kill -9 or a full disk, run the same command to continue where it stopped.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""


def _run(options: ProbeOptions) -> None:
    """Fit probes on the features of a frozen encoder, and measure what they read out of new videos."""
    kinds = options.kinds()
    options, grid = _with_eval_config(options)
    heads = grid or _heads(options)
    # Imported here and below: they need seconds, which --help need not wait for.
    from vjepa_fast.evaluation.report import RESULTS

    options.check(RESULTS)
    from vjepa_fast.checkpoints.open import open_checkpoint

    device = usable_device(options.device)
    opened = apply_config(open_checkpoint(options.checkpoint), options.config)
    if options.task in ("horizon", "surprise"):
        _measure_prediction(options, opened, device)
    else:
        _measure_probes(options, opened, device, kinds, heads)


probe = command(ProbeOptions, _run)


def _with_eval_config(options: ProbeOptions) -> tuple[ProbeOptions, list[HeadSetting] | None]:
    """The options with what Meta's YAML says and the command line does not, and the YAML's grid of probes."""
    if options.eval_config is None:
        return options, None
    from vjepa_fast.evaluation.eval_yaml import read_eval_yaml

    said, given = read_eval_yaml(options.eval_config), options.model_fields_set
    free = {name: value for name, value in said.options.items() if name not in given}
    if options.fps is not None:
        free.pop("frame_step", None)
    for note in said.notes:
        if not (options.augmented and "--augmented" in note):
            say("warning", note)
    grid = None if given & {"lr", "weight_decay", "warmup"} else said.heads
    return options.model_copy(update=free), grid


def _heads(options: ProbeOptions) -> list[HeadSetting]:
    """Every learning rate with every weight decay."""
    rates, decays = options.rates()
    from vjepa_fast.evaluation.attentive_probe import HeadSetting

    return [
        HeadSetting(
            rate,
            decay,
            0.0 if options.warmup else None,
            warmup=options.warmup,
            final_weight_decay=1e-6 if options.style == "vjepa1" else None,
        )
        for decay, rate in itertools.product(decays, rates)
    ]


def _measure_prediction(options: ProbeOptions, opened: Checkpoint, device: torch.device) -> None:
    from vjepa_fast.evaluation.prediction import Prediction, load_encoders
    from vjepa_fast.inference.videos import list_videos

    videos = list_videos([options.val], one_label=options.task == "surprise")
    encoders = load_encoders(opened, options.dtype, fields(options.option or [], "--set"))
    for note in encoders[0].assumed:
        say("warning", note)
    rule = _rule(encoders[0], options.model_copy(update={"segments": 1, "views": 1}))
    model = Prediction.of(*encoders, rule.frames, options.context)
    run_prediction(options, model, videos, rule, device, *_effort(options, device), str(opened.path))


def _measure_probes(
    options: ProbeOptions, opened: Checkpoint, device: torch.device, kinds: list[str], heads: list[HeadSetting]
) -> None:
    from vjepa_fast.evaluation import probes
    from vjepa_fast.evaluation.labels import read_labels
    from vjepa_fast.inference.loading import build

    if options.train is None:
        raise ConfigError("--train is missing; expected labelled videos to fit probes on")
    asked = options.task if options.task in ("classification", "regression") else None
    labels = read_labels(options.train, options.val, asked, options.targets.split(",") if options.targets else ())
    for note in labels.notes:
        say("warning", note)
    if options.augmented and labels.task == "regression":
        say(
            "warning",
            "augmented clips are cropped, sheared and shifted: numbers that say where something is in "
            "the picture no longer fit them",
        )
    overrides = fields(options.option or [], "--set")
    model = build(opened, weights=options.weights, dtype=options.dtype, predictor=False, overrides=overrides)
    for note in model.assumed:
        say("warning", note)
    settings = _settings(options, model, labels, heads)
    rule = _rule(model, options, _layers(model, options))
    run = ProbeRun(model, labels, settings, device, options.out, {name: probes.create(name) for name in kinds})
    run.features(options.cache, rule, *_effort(options, device))
    run.probe(
        {"checkpoint": str(opened.path), "weights": model.weights, "dtype": options.dtype, "command": sys.argv[1:]}
    )


def _effort(options: ProbeOptions, device: torch.device) -> tuple[int, int]:
    """Clips encoded together, and decoding processes."""
    from vjepa_fast.data.workers import auto_num_workers

    batch = options.encoder_batch or (8 if device.type == "cuda" else 1)
    return batch, options.workers or max(1, auto_num_workers(device))


def _settings(options: ProbeOptions, model: InferenceModel, labels: Labels, heads: list[HeadSetting]) -> ProbeSettings:
    from vjepa_fast.evaluation.probes import ProbeSettings

    width, num_heads = model.encoder.embed_dim, options.probe_heads
    if num_heads is None:
        num_heads = 16 if width % 16 == 0 and options.style == "vjepa2" else model.encoder.num_heads
    if width % num_heads:
        raise ConfigError(f"--probe-heads is {num_heads}; expected a divisor of the encoder's width, {width}")
    return ProbeSettings(
        heads,
        options.depth,
        num_heads,
        options.epochs,
        options.batch_size or max(4, min(64, len(labels.train.videos.paths) // 8)),
        decay_all=options.style == "vjepa2",
        clip_norm=1.0 if options.style == "vjepa1" else None,
        augmented=options.augmented,
        seed=options.seed,
    )


def _rule(model: InferenceModel, options: ProbeOptions, layers: tuple[int, ...] | None = None) -> ClipRule:
    from vjepa_fast.evaluation.views import ClipRule
    from vjepa_fast.inference.videos import default_sampling

    sampling = default_sampling(model, options.frames, options.fps, options.size, 1)
    step = options.frame_step
    return ClipRule(
        sampling.frames,
        None if step else sampling.fps,
        step,
        sampling.size,
        options.segments,
        options.views,
        layers=layers,
    )


def _layers(model: InferenceModel, options: ProbeOptions) -> tuple[int, ...] | None:
    """Of --out-layers, tried on the smallest clip that there is."""
    layers = options.layers()
    if layers is None:
        return None
    import torch

    encoder = model.encoder
    clip = torch.zeros(1, encoder.tubelet_size, encoder.patch_size, encoder.patch_size, 3, dtype=torch.uint8)
    try:
        model.encode(clip, layers)
    except ValueError as error:
        raise ConfigError(f"--out-layers is {options.out_layers!r}: {error}") from None
    return layers
