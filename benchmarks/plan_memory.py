"""Peak memory as `vjepa-fast plan` predicts it, beside what the CPU's allocator counts in steps that are run.

    python -m benchmarks.plan_memory --out benchmarks/results/plan_memory_cpu_2026-11-27

Every allocation and release of torch's allocator, as its profiler records them, summed up from before the model is
made; the peak is that of the second step, as the first one has no moments yet. The prediction is for the masks of that
step and for plain PyTorch on a CPU. Bytes do not depend on how busy the machine is, nor on which it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import vjepa_fast as vf
from vjepa_fast.bench.workload import of_config
from vjepa_fast.common import markdown
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.memory import Memory, peak_memory
from vjepa_fast.train.step import TrainStep

SIZES = (("vit_tiny", 64, 8), ("vit_small", 128, 4), ("vit_base", 224, 2))
"""Model, pixels, clips a step."""
NUM_STEPS = 2
_FIRST_OVER = "first step is over"


def config(model: str, crop: int, batch: int, dtype: str, checkpointing: str, num_micro: int, **sizes: Any) -> Config:
    """The recipe of V-JEPA 2 with two masks and its predictor; `sizes` go to its section `model`."""
    return Config.model_validate(
        {
            "model": {
                "model_name": model,
                "pred_num_heads": 12,
                "uniform_power": True,
                "activation_checkpointing": checkpointing,
                **sizes,
            },
            "data": {"crop_size": crop, "batch_size": batch, "dataset_fpcs": [16]},
            "optimization": {"grad_accumulation": num_micro},
            "train": {"dtype": dtype},
        }
    )


def measure(cfg: Config, num_steps: int = NUM_STEPS) -> int:
    """Bytes that are allocated at the peak of all steps but the first; of several, predict takes the largest."""
    device = torch.device("cpu")
    work = of_config("plan", cfg)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        step = TrainStep(work.model(device), cfg)
        for number in range(num_steps):
            # Held until the next one is done, as training holds it.
            result = step(number, work.clips(device), work.masks(device, number))
            if number == 0:
                with record_function(_FIRST_OVER):
                    pass
    del result
    recorded = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    now = peak = 0
    counts = False
    for event in recorded:
        counts = counts or event.name() == _FIRST_OVER
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if counts else 0
    return peak


def predict(cfg: Config, num_steps: int = NUM_STEPS) -> Memory:
    """For the same steps."""
    work, device = of_config("plan", cfg), torch.device("cpu")
    return peak_memory(cfg, [[work.masks(device, number)] for number in range(1, num_steps)], kernels=False)


def _row(case: tuple[str, int, int, str, str, int]) -> dict[str, Any]:
    cfg = config(*case)
    predicted, measured = predict(cfg), measure(cfg)
    names = ("model", "pixels", "clips", "dtype", "checkpointing", "micro_batches")
    return dict(zip(names, case, strict=True)) | {
        "measured": measured,
        "predicted": predicted.peak,
        "permanent": predicted.permanent,
        "where": predicted.where,
        "ratio": predicted.peak / measured,
    }


def to_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Peak memory: predicted by `vjepa-fast plan`, and counted by the allocator",
        "",
        f"Command: `{report['command']}`",
        "",
        f"{report['hardware']}; {report['versions']}; {report['date']}",
        "",
        "Two masks, 16 frames, predictor 12 x 384. MiB; `between steps` is what both have in common: weights, "
        "moments, copies in half precision.",
        "",
    ]
    settings = {"model": "model", "pixels": "pixels", "clips": "clips", "dtype": "dtype"}
    settings |= {"checkpointing": "recomputed", "micro_batches": "micro-batches"}
    sizes = {"permanent": "between steps", "predicted": "predicted", "measured": "measured"}
    rows = [
        [
            *(row[key] for key in settings),
            *(f"{row[key] / 2**20:.0f}" for key in sizes),
            f"{row['ratio']:.3f}",
            row["where"],
        ]
        for row in report["rows"]
    ]
    head = [*settings.values(), *sizes.values(), "predicted / measured", "predicted to be in"]
    lines += markdown.table(head, rows)
    ratios = [row["ratio"] for row in report["rows"]]
    return "\n".join([*lines, "", f"Between {min(ratios):.3f} and {max(ratios):.3f}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    parser.add_argument("--models", nargs="+", default=[name for name, _, _ in SIZES])
    args = parser.parse_args()
    cases = [
        (*size, dtype, *how)
        for size in SIZES
        if size[0] in args.models
        for dtype in ("float32", "bfloat16")
        for how in (("none", 1), ("selective", 1), ("full", 1), ("none", 2))
    ]
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.plan_memory {' '.join(sys.argv[1:])}",
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": f"torch {torch.__version__}, vjepa-fast {vf.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for case in cases:
        report["rows"].append(_row(case))
        print(json.dumps(report["rows"][-1]), flush=True)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(to_markdown(report))


if __name__ == "__main__":
    main()
