"""Which settings let a small model learn in a few hundred steps: one changed at a time, several seeds.

    python -m experiments.small_scale --seeds 3 --jobs 2 --work DIR

Trains the recipe `laptop` with the settings of short runs (SHORT) as experiments.physics_probes does, with each of
VARIANTS, and reads the same quantities out of its encoder. The same command goes on where it was stopped. Written: a
table (.md) and all figures (.json); docs/small_scale.md draws the rules from them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from experiments import RESULTS
from experiments.physics_probes import Job, pack_videos, run, versions
from vjepa_fast.common import markdown
from vjepa_fast.data.generated import physics_scenes
from vjepa_fast.data.generated.physics import make_physics

BLOCKS = "{num_blocks: %d, spatial_scale: [%s, %s], temporal_scale: [1.0, 1.0], aspect_ratio: [0.75, 1.5]}"
"""Multi-block masks of the reference, through all of a clip's time."""

BRIGHT = "bright walls and screens"
"""The variant whose clips have walls and screens much brighter than the background, as the discs are."""

SHORT = ["optimization.lr=1.5e-3", "optimization.ema=[0.99, 1.0]"]
"""Of all variants, unless they say otherwise: what a few hundred steps need."""

VARIANTS: dict[str, tuple[float, list[str]]] = {
    "as it is": (1, []),
    "three times as long": (3, []),
    "batch 8, twice the steps": (2, ["data.global_batch_size=8"]),
    "batch 32, half the steps": (0.5, ["data.global_batch_size=32"]),
    "lr 5e-4": (1, ["optimization.lr=5e-4"]),
    "lr 3e-3": (1, ["optimization.lr=3e-3"]),
    "momentum 0.9": (1, ["optimization.ema=[0.9, 1.0]"]),
    "momentum 0.996": (1, ["optimization.ema=[0.996, 1.0]"]),
    "momentum 0.998": (1, ["optimization.ema=[0.998, 1.0]"]),
    "weight decay 0": (1, ["optimization.weight_decay=0", "optimization.final_weight_decay=0"]),
    "weight decay 0.4": (1, ["optimization.weight_decay=0.4", "optimization.final_weight_decay=0.4"]),
    "beta2 0.95": (1, ["optimization.betas=[0.9,0.95]"]),
    "L1 loss": (1, ["loss.loss_exp=1"]),
    "mask tokens begin at zero": (1, ["model.zero_init_mask_tokens=true"]),
    "multi-block masks": (1, [f"mask.masks=[{BLOCKS % (8, 0.15, 0.15)}, {BLOCKS % (2, 0.7, 0.7)}]"]),
    "4 frames a second, not 6": (1, ["data.fps=4"]),
    "whole pictures, no crops": (
        1,
        ["data.aug.random_resize_scale=[1.0,1.0]", "data.aug.random_resize_aspect_ratio=[1.0,1.0]"],
    ),
    "predictor of width 48": (1, ["model.pred_embed_dim=48"]),
    "predictor of one block": (1, ["model.pred_depth=1"]),
    BRIGHT: (1, []),
}
"""Steps, as a multiple, and overrides."""

READ = (("velocity", "mean"), ("position", "last"), ("time to contact", "last"), ("law", "mean"))
"""Quantities of the table, and the read-out of each."""


def table(found: dict[str, list[dict[str, Any]]], untrained: list[dict[str, Any]]) -> str:
    """Markdown: mean and spread over the seeds."""
    columns = [f"{quantity} ({read_out})" for quantity, read_out in READ]
    rows = []
    for name, runs in {**found, "untrained": untrained}.items():
        cells = []
        for quantity, read_out in READ:
            values = [one["scores"]["encoder"][read_out][quantity] for one in runs]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        cells.append(f"{np.mean([one['rank']['encoder'] for one in runs]):.1f}")
        trained = "log" in runs[0]
        steps = str(runs[0]["steps"]) if trained else ""
        cells.append(f"{np.mean([one['log']['explained'] for one in runs]):.2f}" if trained else "")
        cells.append(f"{np.mean([60 * one['minutes'] / one['steps'] for one in runs]):.2f}" if trained else "")
        rows.append([name, steps, *cells])
    return "\n".join(markdown.table(["changed", "steps", *columns, "rank", "explained", "seconds a step"], rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which settings let a small model learn.")
    parser.add_argument("--steps", type=int, default=360, help="of a run; some variants make a multiple of it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--videos", type=int, nargs=2, default=(400, 200), metavar=("TRAIN", "VAL"))
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--work", type=Path, help="folder of videos and runs; the same command goes on there")
    parser.add_argument("--out", type=Path, help="without suffix; default benchmarks/results/small_scale_...")
    return parser.parse_args()


def main() -> None:
    """Train all variants, write."""
    args = _arguments()
    out = args.out or RESULTS / f"small_scale_cpu_{date.today()}"
    threads = max(1, torch.get_num_threads() // args.jobs)
    names = args.only or list(VARIANTS)
    with tempfile.TemporaryDirectory() as name:
        folder = args.work or Path(name)
        clips = {False: (make_physics(folder / "videos", *args.videos), folder / "pack")}
        if BRIGHT in names:
            with mock.patch.object(physics_scenes, "_GREY", (110.0, 180.0)):
                clips[True] = make_physics(folder / "bright", *args.videos), folder / "bright_pack"
        for made, pack in clips.values():
            pack_videos(made, pack)

        def job(objective: str, seed: int, times: float, changes: list[str], variant: str) -> Job:
            return Job(
                objective,
                seed,
                0.0,
                int(args.steps * times),
                threads,
                SHORT + changes,
                *clips[variant == BRIGHT],
                folder / f"variants_{args.steps}" / variant,
            )

        # The runs of one seed before those of the next, so that an early stop leaves a whole table.
        jobs = [job("latent", seed, *VARIANTS[variant], variant) for seed in range(args.seeds) for variant in names]
        jobs += [job("untrained", seed, 1, [], "untrained") for seed in range(args.seeds)]
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            runs = list(pool.map(run, jobs))
    found = {variant: runs[i : -args.seeds : len(names)] for i, variant in enumerate(names)}
    untrained = runs[-args.seeds :]
    given = " ".join(
        [
            f"--steps {args.steps} --seeds {args.seeds} --jobs {args.jobs}",
            *(["--only", *(json.dumps(name) for name in args.only)] if args.only else []),
        ]
    )
    about = {
        "command": f"python -m experiments.small_scale {given}",
        "date": str(date.today()),
        "versions": versions(),
        "hardware": f"CPU, {args.jobs} runs at a time, {threads} threads each",
    }
    out.with_name(out.name + ".json").write_text(
        json.dumps({**about, "all": SHORT, "changes": VARIANTS, "runs": found, "untrained": untrained}, indent=1) + "\n"
    )
    head = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = (
        f"# Settings of small runs\n\n{head}\n\nR2, or balanced accuracy of `law`, of ridge regression on the "
        "`mean` of all tokens or on those of the `last` frames side by side; mean over the seeds and their spread. "
        "Effective rank of the tokens; how much of the targets is explained at the end.\n\n"
        f"{table(found, untrained)}\n"
    )
    out.with_name(out.name + ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
