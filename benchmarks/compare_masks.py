"""The masks of a ViT-L step (24 clips of 8 x 16 x 16 tokens, 8 blocks of 15 % and 2 of 70 %) beside the reference's.

    VJEPA2_REFERENCE=<checkout of facebookresearch/vjepa2> python -m benchmarks.compare_masks

One core, turns of five calls, another step each time. The reference's collator is called with clips of one number, so
that it does little but draw masks. Results go to benchmarks/results/masks_vs_reference_cpu_<date>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vjepa_fast as vf
from vjepa_fast.bench.reference import REFERENCE_COMMIT
from vjepa_fast.bench.timing import ROOT, Quantiles, environment
from vjepa_fast.bench.workload import LARGE
from vjepa_fast.common import extension, markdown
from vjepa_fast.masking import mask_sample as mask_ops

CALLS = 5
"""Of a turn."""
WHAT = {
    "operators": "operators (lengths, then ids)",
    "sampler": "MaskSampler, extension",
    "numpy": "MaskSampler, NumPy",
    "reference": "reference's collator",
}


def calls() -> dict[str, Callable[[int], object]]:
    """For each of WHAT, a function that draws the masks of a step."""
    from tests.parity import reference_v2
    from tests.parity.mask_cases import MaskCase

    batch_size, masks = LARGE.batch_size, LARGE.config.mask
    sampler = vf.MaskSampler(masks, LARGE.grid, LARGE.config.train.seed)
    ops = mask_ops.operators()
    assert ops is not None
    key = ([value for spec in sampler.specs for value in spec.to_ints()], LARGE.grid, LARGE.config.train.seed, 0)
    frames = LARGE.num_frames
    collator = reference_v2.collator(
        MaskCase("ViT-L", [spec.model_dump() for spec in masks.masks], [frames], crop_size=LARGE.crop_size)
    )

    def operators(step: int) -> object:
        first = torch.tensor([step])
        ids = torch.arange(step * batch_size, (step + 1) * batch_size)
        lengths = ops.mask_lengths(first, ids, ids, *key, -1)
        context, target = lengths.tolist()
        return ops.mask_sample(first, ids, lengths, *key, sum(context), sum(target))

    def numpy(step: int) -> object:
        os.environ["VJEPA_FAST_OPS"] = "ref"
        try:
            return sampler(step, np.arange(step * batch_size, (step + 1) * batch_size))
        finally:
            del os.environ["VJEPA_FAST_OPS"]

    return {
        "operators": operators,
        "sampler": lambda step: sampler(step, np.arange(step * batch_size, (step + 1) * batch_size)),
        "numpy": numpy,
        "reference": lambda step: reference_v2.collate(collator, {frames: batch_size}),
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of single calls, in turns."""
    functions = calls()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            for call in range(CALLS):
                began = time.perf_counter()
                function(turn * CALLS + call)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    return seconds


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about = report["environment"]
    lines = [
        "# Masks of a ViT-L step beside the reference, CPU",
        "",
        f"- hardware: {about['cpu']}, {about['cores']} cores, 1 thread used; load average {about['load_average']:.2f}",
        f"- versions: python {about['python']}, torch {about['torch']}, vjepa_fast {about['vjepa_fast']}, commit "
        f"{about['commit']}{' with uncommitted changes' if about['uncommitted_changes'] else ''}; "
        f"facebookresearch/vjepa2 at {report['reference_commit']}",
        f"- command: `VJEPA2_REFERENCE=... {about['command']}`",
        f"- date: {about['date']}",
        "",
        "24 clips of 8 x 16 x 16 tokens, two masks (8 blocks of 15 %, 2 of 70 %), truncated to the batch minimum; one",
        f"core, {report['rounds']} turns of {CALLS} calls of each, another step each time.",
        "",
    ]
    rows = []
    theirs = report["times"]["reference"]
    for name, title in WHAT.items():
        own = report["times"][name]
        rows.append(
            [
                title,
                f"{own['fastest'] * 1e3:.3f}",
                f"{own['p50'] * 1e3:.3f} ({own['p20'] * 1e3:.3f} to {own['p80'] * 1e3:.3f})",
                f"{theirs['fastest'] / own['fastest']:.0f}",
                f"{theirs['p50'] / own['p50']:.0f}",
            ]
        )
    head = ["what", "fastest, ms", "median, ms (20 % to 80 %)", "reference / this: fastest", "median"]
    lines += markdown.table(head, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="without extension; default: in benchmarks/results, with the date")
    arguments = parser.parse_args()
    if not os.environ.get("VJEPA2_REFERENCE"):
        parser.error("VJEPA2_REFERENCE does not name a checkout of facebookresearch/vjepa2")
    if extension.load().path is None:
        parser.error(f"the extension is not there: {extension.load().reason}")

    torch.set_num_threads(1)
    about = environment(torch.device("cpu"))
    seconds = measure(arguments.rounds)
    report: dict[str, Any] = {
        "environment": about,
        "reference_commit": REFERENCE_COMMIT,
        "rounds": arguments.rounds,
        "times": {name: {"fastest": min(all_), **asdict(Quantiles.of(all_))} for name, all_ in seconds.items()},
        "all_seconds": seconds,
    }
    out = arguments.out or ROOT / "benchmarks" / "results" / f"masks_vs_reference_cpu_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
