"""What a config will be: shapes, tokens, arithmetic, memory, time and cost, as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vjepa_fast.config.schema import Config
from vjepa_fast.cost.flops import step_flops
from vjepa_fast.cost.memory import estimate_memory
from vjepa_fast.cost.operations import Loads, networks_of
from vjepa_fast.cost.parameters import count_parameters
from vjepa_fast.cost.prediction import Prediction
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler

NUM_STEPS = 20
"""Whose masks the figures are a mean of."""


def draw_masks(cfg: Config, batch_size: int, num_steps: int = NUM_STEPS) -> list[list[MaskBatch]]:
    """Masks of the first steps, by the rule and with the seed of the config.

    Args:
        cfg: of the run. Several frames-per-clip groups share the batch by the weights of their datasets.
        batch_size: clips of a step of one process.
        num_steps: how many.
    """
    data = cfg.data
    weights = data.datasets_weights or [1.0] * len(data.dataset_fpcs)
    shares = dict.fromkeys(data.dataset_fpcs, 0.0)
    for fpc, weight in zip(data.dataset_fpcs, weights, strict=True):
        shares[fpc] += weight / sum(weights)
    steps: list[list[MaskBatch]] = [[] for _ in range(num_steps)]
    height, width = (side // data.patch_size for side in data.crop_size)
    for group, (fpc, share) in enumerate(shares.items()):
        count = max(1, round(batch_size * share))
        frames = fpc // data.tubelet_size if fpc > 1 else 1
        truncation = cfg.mask.model_copy(update={"group_size": count})
        sampler = MaskSampler(truncation, (frames, height, width), cfg.train.seed, group)
        for step in range(num_steps):
            steps[step].append(sampler(step, np.arange(step * count, (step + 1) * count)))
    if cfg.img_data is not None:
        # One more group, as in training.
        count = cfg.img_data.per_process
        truncation = (cfg.img_mask or cfg.mask).model_copy(update={"group_size": count, "clips_per_mask": 1})
        sampler = MaskSampler(truncation, (1, height, width), cfg.train.seed)
        for step in range(num_steps):
            steps[step].append(sampler(step, np.arange(step * count, (step + 1) * count)))
    return steps


def _human(value: float, units: Sequence[str] = ("", " k", " M", " G", " T", " P", " E")) -> str:
    place = 0
    while abs(value) >= 1000 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.4g}{units[place]}"


def describe(
    cfg: Config, prediction: Prediction, steps: Sequence[Sequence[MaskBatch]], *, num_gpus: int = 1,
    price: float | None = None,
) -> str:
    """The plan of a run.

    Args:
        cfg: of the run.
        prediction: of its step.
        steps: the masks that it is for.
        num_gpus: processes; each has its own batch.
        price: of one GPU for an hour, in whatever currency.
    """
    encoder, predictor = networks_of(cfg)
    found, loads = count_parameters(cfg.model), Loads.of(steps)
    model, memory, gpu = cfg.model, estimate_memory(cfg, loads), prediction.gpu
    flops = [step_flops(model, list(step)) for step in steps]
    clips, gib = prediction.clips, 2**30
    first = steps[0][0]
    images = "" if cfg.img_data is None else f", {cfg.img_data.per_process} of them images"
    lines = [
        f"encoder       {model.model_name}, {encoder.depth} blocks of {encoder.width}, {encoder.num_heads} heads of "
        f"{encoder.head_dim}, {_human(found.encoder)} parameters",
        f"predictor     {predictor.depth} blocks of {predictor.width}, {predictor.num_heads} heads of "
        f"{predictor.head_dim}, {_human(found.predictor)} parameters",
        f"batch         {clips:g} clips a GPU{images}; frames "
        f"{', '.join(str(f) for f in sorted(set(cfg.data.dataset_fpcs)))}; "
        f"{' x '.join(str(side) for side in cfg.data.crop_size)} pixels; compute in {model.dtype}",
        f"tokens        {first.num_tokens} of a clip ({' x '.join(str(n) for n in first.grid)})"
        + (" in the first group" if len(steps[0]) > 1 else "")
        + f"; a step has {_human(loads.whole.tokens)} target-encoder, {_human(loads.context.tokens)} context, "
          f"{_human(loads.target.tokens)} predicted (mean over {len(steps)} steps)",
    ]
    share = sum(f.total for f in flops) / len(flops) / clips
    parts = ", ".join(
        f"{name.replace('_', ' ')} {_human(sum(getattr(f, name) for f in flops) / len(flops) / clips)}"
        for name in ("target_encoder", "context_encoder", "predictor"))
    lines += [
        f"arithmetic    {_human(share)}FLOP a clip, forward and backward ({parts})",
        f"memory        {memory.states / gib:.1f} GiB of states (parameters {memory.parameters / gib:.1f}, gradients "
        f"{memory.gradients / gib:.1f}, moments {memory.optimizer_state / gib:.1f}, half-precision copies "
        f"{memory.shadows / gib:.1f})",
        f"              activations {memory.activations / gib:.1f} GiB at the peak, with activation checkpointing "
        f"{memory.activations_checkpointed / gib:.1f} GiB"
        f" ({'on' if model.use_activation_checkpointing else 'off'} in this config)",
    ]
    peak = memory.peak_checkpointed if model.use_activation_checkpointing else memory.peak
    fits = "fits" if peak < 0.92 * gpu.memory_bytes else "does not fit"
    lines += [
        f"              {peak / gib:.1f} GiB in all: {fits} the {gpu.memory_bytes / gib:.0f} GiB of {gpu.name}",
        "", f"Milliseconds of a step on {gpu.name}, predicted:", "", prediction.as_table(), "",
        f"step          {prediction.total * 1e3:.1f} ms, {prediction.clips_per_s:.1f} clips/s a GPU, "
        f"{prediction.flops / prediction.total / 1e12:.0f} model TFLOP/s"
        + (", waiting for the loader" if prediction.loader and prediction.loader > prediction.busy else ""),
    ]
    lines += _schedule(cfg, prediction, num_gpus, price)
    assumed = [name for name in ("matmul_share", "memory_share", "attention_flops_per_s", "launch_s")
               if name not in gpu.measured]
    if assumed:
        lines += ["", f"Assumed, not measured: {', '.join(assumed)} (vjepa_fast/cost/gpus.py); --rates FILE takes "
                      "measured ones."]
    return "\n".join(lines)


def _schedule(cfg: Config, prediction: Prediction, num_gpus: int, price: float | None) -> list[str]:
    opt = cfg.optimization
    if opt.ipe is None:
        return ["schedule      as many steps an epoch as the data gives (optimization.ipe), so no duration"]
    num_steps = opt.num_steps if cfg.train.max_steps is None else min(opt.num_steps, cfg.train.max_steps)
    hours = num_steps * prediction.total / 3600
    clips = _human(num_steps * prediction.clips * num_gpus)
    lines = [f"schedule      {num_steps} steps, {clips} clips: {hours:.2f} h on "
             f"{num_gpus} GPU{'s' * (num_gpus > 1)}, {hours * num_gpus:.1f} GPU-hours, without communication"]
    if price is not None:
        lines.append(f"cost          {hours * num_gpus * price:.2f} at {price:g} a GPU-hour")
    return lines
