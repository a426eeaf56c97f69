"""Describes a config as text: shapes, tokens, arithmetic, memory, time and cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vjepa_fast.config.schema import Config
from vjepa_fast.cost.advice import FITS, Adviser
from vjepa_fast.cost.flops import step_flops
from vjepa_fast.cost.gpus import Gpu
from vjepa_fast.cost.loads import Loads, image_groups, networks_of
from vjepa_fast.cost.memory import peak_memory
from vjepa_fast.cost.parameters import count_parameters
from vjepa_fast.cost.prediction import Prediction
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler

NUM_STEPS = 100
"""Whose masks the figures are a mean of, and of memory the largest."""

GIB = 2**30


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
    cfg: Config,
    prediction: Prediction,
    steps: Sequence[Sequence[MaskBatch]],
    *,
    num_gpus: int = 1,
    price: float | None = None,
    num_videos: int | None = None,
    kernels: bool = True,
) -> str:
    """The plan of a run.

    Args:
        cfg: of the run.
        prediction: of its step.
        steps: the masks that it is for.
        num_gpus: processes; each has its own batch.
        price: of one GPU for an hour, in whatever currency.
        num_videos: of the data.
        kernels: as vjepa_fast.cost.prediction.predict.
    """
    encoder, predictor = networks_of(cfg)
    images_of = image_groups(cfg)
    found, loads = count_parameters(cfg.model), Loads.of(steps, images_of)
    model, gpu = cfg.model, prediction.gpu
    flops = [step_flops(model, list(step), images_of) for step in steps]
    clips = prediction.clips
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
        for name in ("target_encoder", "context_encoder", "predictor")
    )
    lines += [
        f"arithmetic    {_human(share)}FLOP a clip, forward and backward ({parts})",
        *_memory_lines(cfg, steps, gpu, num_gpus, kernels),
        "",
        f"Milliseconds of a step on {gpu.name}, predicted:",
        "",
        prediction.as_table(),
        "",
        f"step          {prediction.total * 1e3:.1f} ms, {prediction.clips_per_s:.1f} clips/s a GPU, "
        f"{prediction.flops / prediction.total / 1e12:.0f} model TFLOP/s"
        + (", waiting for the loader" if prediction.loader and prediction.loader > prediction.busy else ""),
    ]
    lines += _schedule(cfg, prediction, num_gpus, price, num_videos)
    assumed = [
        name
        for name in ("matmul_share", "memory_share", "attention_flops_per_s", "launch_s")
        if name not in gpu.measured
    ]
    if assumed:
        lines += [
            "",
            f"Assumed, not measured: {', '.join(assumed)} (vjepa_fast/cost/gpus.py); --rates FILE takes measured ones.",
        ]
    return "\n".join(lines)


def _memory_lines(
    cfg: Config, steps: Sequence[Sequence[MaskBatch]], gpu: Gpu, num_gpus: int, kernels: bool
) -> list[str]:
    """Bytes by what they are for, whether they fit, and what would make them fit."""
    memory = peak_memory(cfg, steps, num_processes=num_gpus, kernels=kernels)
    adviser = Adviser(cfg, steps, num_gpus, kernels)
    shared = "of everything" if cfg.train.parallel == "fsdp" else "of the optimizer" * cfg.train.shard_optimizer
    share = f" (the share {shared} that each of {num_gpus} processes has)" if shared and num_gpus > 1 else ""
    num_micro = cfg.optimization.grad_accumulation
    settings = f"activation checkpointing {cfg.model.checkpointing}, {num_micro} micro-batch{'es' * (num_micro > 1)}"
    lines = [
        f"memory        {memory.permanent / GIB:.1f} GiB all the time: parameters {memory.parameters / GIB:.1f}, "
        f"optimizer {memory.optimizer_state / GIB:.1f}, half-precision copies {memory.shadows / GIB:.1f}{share}",
        f"              gradients {memory.gradients / GIB:.1f} GiB; activations, clips and gradients at the peak "
        f"{memory.activations / GIB:.1f} GiB ({settings}; {memory.where})",
    ]
    limit = FITS * gpu.memory_bytes
    room = (
        f"{memory.peak / GIB:.1f} GiB in all, in the largest of {len(steps)} steps: ",
        f"the {limit / GIB:.1f} GiB that can be used of the {gpu.memory_bytes / GIB:.1f} of {gpu.name}",
    )
    if memory.peak <= limit:
        return [*lines, f"              {room[0]}fits {room[1]}"]
    lines.append(f"              {room[0]}does not fit {room[1]}, by {(memory.peak - limit) / GIB:.1f} GiB")
    fitting = adviser.what_fits(limit)
    if fitting:
        return [*lines, *(f"              fits with {change}" for change in fitting)]
    least = adviser.least()
    advice = "use fewer clips a process, a smaller model or a larger GPU"
    if num_gpus == 1:
        advice += ", or several GPUs (--gpus), which can share the optimizer's state"
    return [*lines, f"              no setting is enough (least with {least}); {advice}"]


def _schedule(
    cfg: Config, prediction: Prediction, num_gpus: int, price: float | None, num_videos: int | None
) -> list[str]:
    opt, lines = cfg.optimization, []
    clips_a_step = (prediction.clips - (0 if cfg.img_data is None else cfg.img_data.per_process)) * num_gpus
    ipe = opt.ipe
    if num_videos is not None:
        steps = max(1, int(num_videos * cfg.data.clips_per_video // clips_a_step))
        ipe = ipe or steps
        lines.append(
            f"data          {_human(num_videos)} videos: once through them in {steps} steps, "
            + _duration(steps, prediction, num_gpus, price)
        )
    if ipe is None:
        return [
            *lines,
            "schedule      as many steps an epoch as the data gives (optimization.ipe), so no duration; "
            "--videos says how many videos there are",
        ]
    num_steps = opt.epochs * ipe
    num_steps = num_steps if cfg.train.max_steps is None else min(num_steps, cfg.train.max_steps)
    clips = _human(num_steps * prediction.clips * num_gpus)
    duration = _duration(num_steps, prediction, num_gpus, price)
    return [*lines, f"schedule      {num_steps} steps, {clips} clips: {duration}"]


def _duration(num_steps: int, prediction: Prediction, num_gpus: int, price: float | None) -> str:
    hours = num_steps * prediction.total / 3600
    days = f" ({hours / 24:.1f} days)" if hours >= 24 else ""
    cost = "" if price is None else f", cost {hours * num_gpus * price:.2f} at {price:g} a GPU-hour"
    return (
        f"{hours:.2f} h{days} on {num_gpus} GPU{'s' * (num_gpus > 1)}, {hours * num_gpus:.1f} GPU-hours, without "
        f"communication{cost}"
    )
