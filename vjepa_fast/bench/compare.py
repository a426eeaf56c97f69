"""Compares our step with the reference's."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vjepa_fast.bench.reference import ReferenceStep
from vjepa_fast.bench.steps import OurStep, Step, check_same_loss, interleave, masks_of_batches, profile_steps
from vjepa_fast.bench.timing import Limits, Quantiles, synchronize
from vjepa_fast.bench.workload import Workload
from vjepa_fast.common.errors import UserError
from vjepa_fast.cost.flops import step_flops
from vjepa_fast.train.speed.graphs import GraphedStep

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative difference of the losses of the first step, above which nothing is timed."""

ON_CPU: dict[str, dict[str, bool]] = {"reference": {"checkpointing": False}}
"""Its fused attention is on, and nothing is computed twice."""

ON_GPU: dict[str, dict[str, bool]] = {
    "reference as configured": {"checkpointing": True},
    "reference, cuDNN attention off": {"checkpointing": True, "cudnn_attention": False},
    "reference, and no checkpointing": {"checkpointing": False, "cudnn_attention": False},
    "reference, and compiled": {"checkpointing": False, "cudnn_attention": False, "compiled": True},
}
"""From what a user gets to its best. torch may prefer cuDNN's attention, which plans anew for each token count."""


def step_figures(workload: Workload, ours: OurStep, seconds: list[float], limits: Limits) -> dict[str, Any]:
    """Quantiles of a side's times and the rates that follow."""
    times = Quantiles.of(seconds)
    flops = sum(step_flops(workload.config.model, masks).total for masks in ours.masks) / len(ours.masks)
    return asdict(times) | {
        "clips_per_s": workload.batch_size / times.p50,
        "model_tflop_per_s": flops / times.p50 / 1e12,
        "share_of_matmul_rate": flops / times.p50 / limits.flops_per_s,
    }


def beside_reference(
    workload: Workload,
    device: torch.device,
    root: Path,
    variants: Mapping[str, Mapping[str, bool]],
    limits: Limits,
    *,
    num_batches: int,
    rounds: int,
    warmup_s: float,
    budget_s: float,
) -> dict[str, Any]:
    """Steps of ours and of settings of the reference in turns, from the same weights on the same batches.

    Args:
        workload: model and batch.
        device: where.
        root: checkout of the reference.
        variants: arguments of ReferenceStep, by the name of the setting.
        limits: of the device.
        num_batches: different batches.
        rounds: timed steps of each side.
        warmup_s: how long the first pass over the batches may take.
        budget_s: how long the timed steps may take.

    Raises:
        ArithmeticError: the losses of the first step differ.
    """
    ours = OurStep(workload, device, num_batches)
    steps: dict[str, Step] = {"ours": ours}
    losses = {}
    for name, options in variants.items():
        steps[name] = reference = ReferenceStep(root, ours, **options)
        losses[name] = reference(0)
    losses["ours"] = float(ours(0))
    check_same_loss(losses, TOLERANCE[workload.torch_dtype])
    # Nearly every batch of a real run has token counts that were never seen before, so the first pass over the batches
    # is reported beside the later ones: what plans or compiles by shape pays there.
    unseen = interleave(steps, device, max(1, num_batches - 1), first_step=1, budget_s=warmup_s)
    gc.collect()
    seconds = interleave(steps, device, rounds, budget_s=budget_s)
    out: dict[str, Any] = {"first_loss": losses}
    for name, values in seconds.items():
        ratios = [b / a for a, b in zip(seconds["ours"], values, strict=True)]
        out[name] = step_figures(workload, ours, values, limits) | {
            "over_ours": asdict(Quantiles.of(ratios)),
            "unseen_shapes": asdict(Quantiles.of(unseen[name])),
            "all_seconds": values,
        }
    return out


def measure_step(
    workload: Workload, device: torch.device, limits: Limits, *, num_batches: int, rounds: int, budget_s: float
) -> dict[str, Any]:
    """Our step by itself: `figures` with peak memory, `tokens` of the batches, `profile`, and on a GPU `graphed`."""
    ours = OurStep(workload, device, num_batches)
    unseen = interleave({"ours": ours}, device, num_batches, budget_s=budget_s, min_rounds=1)["ours"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = interleave({"ours": ours}, device, rounds, budget_s=budget_s)["ours"]
    found = step_figures(workload, ours, seconds, limits) | {
        "unseen_shapes": asdict(Quantiles.of(unseen)),
        "all_seconds": seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    synchronize(device)
    out = {"figures": found, "tokens": masks_of_batches(ours.masks), "profile": profile_steps(ours, range(1), device)}
    if device.type == "cuda":
        out["graphed"] = measure_graphed(ours, limits, rounds=rounds, budget_s=budget_s)
    return out


def measure_graphed(ours: OurStep, limits: Limits, *, rounds: int, budget_s: float) -> dict[str, Any]:
    """Our step replayed as CUDA graphs in turns with the eager one; only `error` where that cannot be.

    Args:
        ours: the eager step.
        limits: of the device.
        rounds: timed steps of each.
        budget_s: how long they may take.
    """
    device = ours.clips[0].device
    try:
        graphed = OurStep(ours.workload, device, len(ours.masks), graphs=True)
        began = time.perf_counter()
        graphed.warm_up()
        synchronize(device)
        warm_up_s = time.perf_counter() - began
        seconds = interleave({"eager": ours, "graphed": graphed}, device, rounds, budget_s=budget_s)
    except (UserError, torch.OutOfMemoryError) as error:
        return {"error": str(error).splitlines()[0]}
    assert isinstance(graphed.run, GraphedStep)
    if graphed.run.stopped or not graphed.run.num_replayed:
        return {"error": "no step was replayed, as a warning says"}
    ratios = [b / a for a, b in zip(seconds["graphed"], seconds["eager"], strict=True)]
    return step_figures(ours.workload, graphed, seconds["graphed"], limits) | {
        "eager_over_graphed": asdict(Quantiles.of(ratios)),
        "warm_up_s": warm_up_s,
        "eager": step_figures(ours.workload, ours, seconds["eager"], limits),
        "num_buckets": len(graphed.run.buckets),
        "num_replayed": graphed.run.num_replayed,
        "num_eager": graphed.run.num_eager,
    }


def reference_settings(
    workload: Workload,
    device: torch.device,
    root: Path,
    limits: Limits,
    *,
    num_batches: int,
    rounds: int,
    budget_s: float,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each setting of the reference that fits the device, in turns with ours; one at a time, so that two models at
    most are in memory. A setting that runs out of memory has only `error`."""
    for name, options in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        try:
            found = beside_reference(
                workload,
                device,
                root,
                {name: options},
                limits,
                num_batches=num_batches,
                rounds=rounds,
                warmup_s=budget_s,
                budget_s=budget_s,
            )
        except torch.OutOfMemoryError as error:
            yield name, {"error": f"out of memory: {str(error).splitlines()[0]}"}
        else:
            yield name, {**found[name], "ours_beside_it": found["ours"], "first_loss": found["first_loss"]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
