"""Our training step beside the reference's on a CPU: the same config, weights, clips and masks, step by step in turns.

    VJEPA2_REFERENCE=/path/to/vjepa2 python -m benchmarks.compare_reference

fp32, SDPA on, activation checkpointing off, the reference's predictor (12 x 384, 12 heads), optimizer and EMA
included, masks excluded. Nothing is timed unless the losses of the first step agree to 1e-5. The reference's ceiling
is its whole time over its time in matrix products and attention: how much faster it would be if all else were free.
Each of its timed steps is followed by one on the same batch under the profiler, as the speed of a shared machine
drifts: two steps a minute apart can differ by more than what is to be measured.
Results go to benchmarks/results/step_vs_reference_cpu_<date>.json and .md.
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

from vjepa_fast.bench.reference import REFERENCE_COMMIT, ReferenceStep
from vjepa_fast.bench.steps import OurStep, check_same_loss, interleave, masks_of_batches, profile_steps
from vjepa_fast.bench.timing import ROOT, Limits, Quantiles, environment, limits_as_dict, measure_limits
from vjepa_fast.bench.workload import BASE, SMALL, TINY, TRIAL, Workload
from vjepa_fast.common import markdown
from vjepa_fast.cost.flops import step_flops

TOLERANCE = 1e-5
_WORKLOADS = {"tiny": TINY, "small": SMALL, "base": BASE, "trial": TRIAL}
_DEFAULT = ("tiny", "small", "base")
_ROUNDS = {"tiny": 24, "small": 12, "base": 6, "trial": 4}
_NUM_BATCHES = {"tiny": 4, "small": 4, "base": 2, "trial": 2}
"""Different batches; the rounds are whole cycles of them, so that timed and profiled steps do the same work."""


def compare(workload: Workload, rounds: int, num_batches: int, limits: Limits) -> dict[str, Any]:
    """One config.

    Args:
        workload: model and batch.
        rounds: timed steps of each side.
        num_batches: different batches.
        limits: of this machine.

    Raises:
        ArithmeticError: the losses differ.
    """
    cpu = torch.device("cpu")
    ours = OurStep(workload, cpu, num_batches)
    reference = ReferenceStep(Path(os.environ["VJEPA2_REFERENCE"]), ours, checkpointing=False)
    losses = {"ours": ours(0).item(), "reference": reference(0)}
    check_same_loss(losses, TOLERANCE)
    interleave({"ours": ours, "reference": reference}, cpu, 1, first_step=1)
    gc.collect()
    products: list[float] = []

    def profiled(step: int) -> None:
        kinds = profile_steps(reference, [step], cpu)["ms_by_kind"]
        products.append((kinds["matmul"] + kinds["attention"]) / 1e3)

    seconds = interleave({"ours": ours, "reference": reference, "profiled": profiled}, cpu, rounds, first_step=2)
    del seconds["profiled"]
    last = 2 + rounds
    profiles = {
        name: profile_steps(step, range(last, last + num_batches), cpu)
        for name, step in (("ours", ours), ("reference", reference))
    }
    times = {name: Quantiles.of(values) for name, values in seconds.items()}
    ceiling = Quantiles.of([b / a for a, b in zip(products, seconds["reference"], strict=True)])
    ratio = Quantiles.of([b / a for a, b in zip(seconds["ours"], seconds["reference"], strict=True)])
    flops = sum(step_flops(workload.config.model, masks).total for masks in ours.masks) / num_batches
    rate = flops / times["ours"].p50
    return {
        "config": workload.name,
        "batch_size": workload.batch_size,
        "tokens": masks_of_batches(ours.masks),
        "first_loss": losses,
        "seconds": {name: asdict(value) for name, value in times.items()},
        "all_seconds": seconds,
        "ratio": asdict(ratio),
        "ceiling": asdict(ceiling),
        "product_seconds": products,
        "share_of_ceiling": ratio.p50 / ceiling.p50,
        "model_gflop": flops / 1e9,
        "gflop_per_s": rate / 1e9,
        "share_of_matmul_rate": rate / limits.flops_per_s,
        "clips_per_s": workload.batch_size / times["ours"].p50,
        "profiles": profiles,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about, limits = report["environment"], report["limits"]
    lines = [
        "# Training step beside the reference, CPU",
        "",
        f"- hardware: {about['cpu']}, {about['cores']} cores, {about['threads']} threads used; load average "
        f"{about['load_average']:.2f} before, {report['load_average_after']:.2f} after the run itself",
        f"- measured limits: copy {limits['bytes_per_s'] / 1e9:.1f} GB/s, {limits['dtype']} matrix product "
        f"{limits['flops_per_s'] / 1e9:.0f} GFLOP/s",
        f"- versions: python {about['python']}, torch {about['torch']}, vjepa_fast {about['vjepa_fast']}, commit "
        f"{about['commit']}{' with uncommitted changes' if about['uncommitted_changes'] else ''}; "
        f"facebookresearch/vjepa2 at {report['reference_commit']}",
        f"- command: `VJEPA2_REFERENCE=... {about['command']}`",
        f"- date: {about['date']}",
        "",
        "fp32, SDPA on, activation checkpointing off, predictor 12 x 384 with 12 heads, 8 frames (ViT-B: 16); forward,",
        "backward, AdamW and EMA, masks drawn beforehand; steps in turns, each side on the same clips and masks. The",
        "reference's clips are normalised beforehand, ours in the step. Times are medians with quantiles 20 to 80; the",
        "ratio is the median of the ratios of neighbouring steps. Ceiling: the reference's time over that in matrix",
        "products (with the patch embedding's convolution) and attention, which a profiled step right after the timed",
        "one tells; the median of these.",
        "",
        *_times(report["configs"]),
        "",
        "Milliseconds a step by kind, under the profiler:",
        "",
        *markdown.table(
            ["config", "side", "matmul", "attention", "other", "operators called"],
            [
                [
                    found["config"],
                    side,
                    *(f"{recorded['ms_by_kind'][kind]:.1f}" for kind in ("matmul", "attention", "other")),
                    recorded["num_operators"],
                ]
                for found in report["configs"]
                for side, recorded in found["profiles"].items()
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _times(configs: list[dict[str, Any]]) -> list[str]:
    head = ["config", "batch", "ours, ms", "reference, ms", "ratio", "ceiling", "ratio / ceiling", "clips/s"]
    rows = [
        [
            found["config"],
            found["batch_size"],
            *(spread(found["seconds"][side], 1, 1e3) for side in ("ours", "reference")),
            spread(found["ratio"], 3),
            spread(found["ceiling"], 3),
            f"{100 * found['share_of_ceiling']:.0f} %",
            f"{found['clips_per_s']:.2f}",
            f"{found['gflop_per_s']:.0f} ({100 * found['share_of_matmul_rate']:.0f} %)",
        ]
        for found in configs
    ]
    return markdown.table([*head, "GFLOP/s (of matrix product rate)"], rows)


def spread(quantiles: dict[str, Any], digits: int, factor: float = 1.0) -> str:
    """The median of measurements and what most lie between, times a factor."""
    low, middle, high = (f"{quantiles[name] * factor:.{digits}f}" for name in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


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
    limits = measure_limits(torch.device("cpu"), small=arguments.configs == ["trial"])
    report: dict[str, Any] = {
        "environment": about,
        "limits": limits_as_dict(limits),
        "reference_commit": REFERENCE_COMMIT,
        "configs": [],
    }
    out = arguments.out or ROOT / "benchmarks" / "results" / f"step_vs_reference_cpu_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.configs:
        found = compare(_WORKLOADS[name], arguments.rounds or _ROUNDS[name], _NUM_BATCHES[name], limits)
        print(
            f"{found['config']}: ours {found['seconds']['ours']['p50'] * 1e3:.1f} ms, reference "
            f"{found['seconds']['reference']['p50'] * 1e3:.1f} ms, ratio {found['ratio']['p50']:.3f}, ceiling "
            f"{found['ceiling']['p50']:.3f}",
            flush=True,
        )
        report["configs"].append(found)
        report["load_average_after"] = os.getloadavg()[0]
        out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
