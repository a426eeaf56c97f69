"""The reference's training step with vf.swap and without it, and our own, on a CPU, step by step in turns.

    VJEPA2_REFERENCE=/path/to/vjepa2 python -m benchmarks.swap_step

fp32, SDPA on, activation checkpointing off, the reference's predictor (12 x 384, 12 heads). The first two sides are the
reference's step: its wrappers, its loss, its AdamW and its moving average; in one of them encoder, predictor and target
encoder have been swapped. The third is ours as `vjepa-fast train` runs it. All have the same weights, clips and masks,
and nothing is timed unless the losses of the first step agree to 1e-5. Results go to
benchmarks/results/swap_step_cpu_<date>.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import vjepa_fast as vf
from benchmarks.compare_reference import spread
from vjepa_fast.bench.reference import REFERENCE_COMMIT, ReferenceStep
from vjepa_fast.bench.steps import OurStep, check_same_loss, interleave, masks_of_batches
from vjepa_fast.bench.timing import ROOT, Quantiles, environment
from vjepa_fast.bench.workload import BASE, SMALL, TINY, TRIAL, Workload
from vjepa_fast.common import markdown

TOLERANCE = 1e-5
PROMISED = 1.1
"""Times the reference's speed by `swap` alone."""
_WORKLOADS = {"tiny": TINY, "small": SMALL, "base": BASE, "trial": TRIAL}
_DEFAULT = ("tiny", "small")
_ROUNDS = {"tiny": 24, "small": 12, "base": 6, "trial": 3}
_NUM_BATCHES = 2


def compare(workload: Workload, rounds: int) -> dict[str, Any]:
    """One config.

    Raises:
        ArithmeticError: the losses differ.
    """
    cpu, root = torch.device("cpu"), Path(os.environ["VJEPA2_REFERENCE"])
    ours = OurStep(workload, cpu, _NUM_BATCHES)
    reference, swapped = (ReferenceStep(root, ours, checkpointing=False) for _ in range(2))
    networks = swapped.networks
    vf.swap(networks["encoder"], networks["predictor"], networks["target_encoder"], inplace=True)
    steps = {"reference": reference, "swapped": swapped, "ours": ours}
    check_same_loss({name: float(step(0)) for name, step in steps.items()}, TOLERANCE)
    interleave(steps, cpu, 1, first_step=1)
    gc.collect()
    seconds = interleave(steps, cpu, rounds, first_step=2)
    ratios = {
        name: Quantiles.of([theirs / own for theirs, own in zip(seconds["reference"], seconds[name], strict=True)])
        for name in ("swapped", "ours")
    }
    return {
        "config": workload.name,
        "batch_size": workload.batch_size,
        "tokens": masks_of_batches(ours.masks),
        "seconds": {name: asdict(Quantiles.of(values)) for name, values in seconds.items()},
        "all_seconds": seconds,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
    }


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about = report["environment"]
    lines = [
        "# The reference's training step with vf.swap, CPU",
        "",
        f"- hardware: {about['cpu']}, {about['cores']} cores, {about['threads']} threads used; load average "
        f"{about['load_average']:.2f} before, {report['load_average_after']:.2f} after the run itself",
        f"- versions: python {about['python']}, torch {about['torch']}, vjepa_fast {about['vjepa_fast']}, commit "
        f"{about['commit']}{' with uncommitted changes' if about['uncommitted_changes'] else ''}; "
        f"facebookresearch/vjepa2 at {report['reference_commit']}",
        f"- command: `VJEPA2_REFERENCE=... {about['command']}`",
        f"- date: {about['date']}",
        "",
        "fp32, SDPA on, activation checkpointing off, predictor 12 x 384 with 12 heads, 8 frames (ViT-B: 16), masks",
        "drawn beforehand, steps in turns. Swapped: the reference's step with its optimizer, moving average and loss,",
        "its three networks swapped. Ours: the step of `vjepa-fast train`. Times are medians with quantiles 20 to 80,",
        f"ratios the medians of those of neighbouring steps. Promised of the swap alone: {PROMISED}.",
        "",
    ]
    rows = []
    for found in report["configs"]:
        times = [spread(found["seconds"][name], 1, 1e3) for name in ("reference", "swapped", "ours")]
        ratios = [spread(found["ratios"][name], 3) for name in ("swapped", "ours")]
        rows.append([found["config"], found["batch_size"], *times, *ratios])
    head = ["config", "batch", "reference, ms", "swapped, ms", "ours, ms", "reference / swapped", "reference / ours"]
    lines += markdown.table(head, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--configs", nargs="+", choices=sorted(_WORKLOADS), default=list(_DEFAULT))
    parser.add_argument("--rounds", type=int, help="steps of each side; default: by config")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without extension; default: in benchmarks/results, with the date")
    arguments = parser.parse_args()
    if not os.environ.get("VJEPA2_REFERENCE"):
        parser.error("VJEPA2_REFERENCE does not name a checkout of facebookresearch/vjepa2")

    torch.set_num_threads(arguments.threads)
    about = environment(torch.device("cpu"))
    report: dict[str, Any] = {"environment": about, "reference_commit": REFERENCE_COMMIT, "configs": []}
    out = arguments.out or ROOT / "benchmarks" / "results" / f"swap_step_cpu_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.configs:
        report["configs"].append(compare(_WORKLOADS[name], arguments.rounds or _ROUNDS[name]))
        report["load_average_after"] = os.getloadavg()[0]
        out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
