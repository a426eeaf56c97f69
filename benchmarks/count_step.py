"""Kernel launches and bytes of a training step, ours and the reference's, counted on fake tensors: no GPU, no waiting.

    VJEPA2_REFERENCE=/path/to/vjepa2 python -m benchmarks.count_step

What is counted, and how, is said in vjepa_fast/cost/counter.py. Ours runs on the kernels' path and on plain PyTorch;
the reference with activation checkpointing, as all of its configs have it, and without. Its autocast is torch's for the
CPU, with layer norms in fp32 as on a GPU; its AdamW is the multi-tensor one that torch takes on a GPU, each operator of
which counts as one launch; its GradScaler, which does nothing without a GPU, is left out. Results go to
benchmarks/results/step_counts_<date>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from vjepa_fast.bench.reference import REFERENCE_COMMIT, ReferenceStep, build_networks, load_modules
from vjepa_fast.bench.steps import OurStep
from vjepa_fast.bench.timing import ROOT, environment
from vjepa_fast.bench.workload import LARGE, TINY, TRIAL, Workload
from vjepa_fast.common import markdown
from vjepa_fast.cost.counter import Tally, count, count_step, fake_parameters, fake_tensors
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.train.step import TrainStep

_WORKLOADS = {"tiny": TINY, "large": LARGE, "trial": TRIAL}
_CPU = torch.device("cpu")


class _Batches(OurStep):
    """The batches of a step of ours without the step: fake clips, true masks."""

    def __init__(self, workload: Workload, masks: MaskBatch) -> None:
        self.workload, self.masks = workload, [masks]
        self.clips = [
            torch.empty(
                (workload.batch_size, workload.num_frames, workload.crop_size, workload.crop_size, 3), dtype=torch.uint8
            )
        ]


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Layer norms in fp32 under autocast, and no sizes read back while modules are built."""
    layer_norm, linspace = F.layer_norm, torch.linspace

    def in_fp32(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    with (
        mock.patch.object(F, "layer_norm", in_fp32),
        mock.patch.object(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"})),
    ):
        yield


def count_reference(workload: Workload, masks: MaskBatch, root: Path, checkpointing: bool) -> dict[str, Tally]:
    """A step of the reference; its parts have no labels, so all of it is `other`."""
    meta = masks.to_meta()
    with _as_on_a_gpu():
        with torch.device("meta"):
            networks = build_networks(load_modules(root), workload.config)
        with fake_tensors():
            return _count_reference(networks, workload, masks, meta, root, checkpointing)


def _count_reference(
    networks: torch.nn.ModuleDict, workload: Workload, masks: MaskBatch, meta: Any, root: Path, checkpointing: bool
) -> dict[str, Tally]:
    with (
        mock.patch.object(ReferenceStep, "_networks", lambda *_: fake_parameters(networks)),
        mock.patch.object(MaskBatch, "to_meta", lambda _: meta),
    ):
        step = ReferenceStep(root, _Batches(workload, masks), checkpointing=checkpointing)
    for group in step.optimizer.param_groups:
        group["foreach"] = True
    step.train(0)
    return count(lambda: step.train(0))


def as_dict(tallies: dict[str, Tally]) -> dict[str, Any]:
    """For a JSON file."""
    total = sum(tallies.values(), Tally())
    return {
        "launches": total.launches,
        "gigabytes": total.num_bytes / 1e9,
        "elementwise_gigabytes": total.elementwise_bytes / 1e9,
        "operators": dict(total.operators.most_common(30)),
        "parts": {
            part: {"launches": tally.launches, "gigabytes": tally.num_bytes / 1e9} for part, tally in tallies.items()
        },
    }


def compare(workload: Workload, root: Path | None) -> dict[str, Any]:
    """All sides on the same masks."""
    masks = workload.masks(_CPU)
    sides = {
        "ours, kernels": count_step(workload.config, [masks], kernels=True, make_step=TrainStep),
        "ours, plain PyTorch": count_step(workload.config, [masks], kernels=False, make_step=TrainStep),
    }
    if root is not None:
        sides["reference as configured"] = count_reference(workload, masks, root, True)
        sides["reference, no checkpointing"] = count_reference(workload, masks, root, False)
    return {
        "config": workload.name,
        "dtype": workload.dtype,
        "batch_size": workload.batch_size,
        "sides": {name: as_dict(tallies) for name, tallies in sides.items()},
    }


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about = report["environment"]
    lines = [
        "# Kernel launches and bytes of a training step, counted",
        "",
        f"- versions: torch {about['torch']}, vjepa_fast {about['vjepa_fast']}, commit {about['commit']}"
        f"{' with uncommitted changes' if about['uncommitted_changes'] else ''}; facebookresearch/vjepa2 at "
        f"{REFERENCE_COMMIT}",
        f"- command: `VJEPA2_REFERENCE=... {about['command']}`",
        f"- date: {about['date']}",
        "",
        "Counted on fake tensors as torch dispatches operators: each that computes or copies is a launch, views are",
        "none; bytes are those of its inputs and outputs. Forward, backward, AdamW and EMA of the second step on one",
        "batch, under the rules in benchmarks/count_step.py. Nothing here was run on a GPU.",
        "",
    ]
    rows = []
    for found in report["configs"]:
        own = found["sides"]["ours, kernels"]["launches"]
        rows += [
            [
                f"{found['config']}, batch {found['batch_size']}, {found['dtype']}",
                name,
                side["launches"],
                f"{side['gigabytes']:.2f}",
                f"{side['elementwise_gigabytes']:.2f}",
                f"{side['launches'] / own:.1f}",
            ]
            for name, side in found["sides"].items()
        ]
    head = ["config", "side", "launches", "GB", "GB outside matrix products and attention", "launches over ours"]
    lines += markdown.table(head, rows)
    for found in report["configs"]:
        parts = found["sides"]["ours, kernels"]["parts"]
        counts = [(part, info["launches"], f"{info['gigabytes']:.2f}") for part, info in parts.items()]
        lines += ["", f"Ours by part, kernels, {found['config']}:", ""]
        lines += markdown.table(["part", "launches", "GB"], counts)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--configs", nargs="+", choices=sorted(_WORKLOADS), default=["tiny", "large"])
    parser.add_argument("--out", type=Path, help="without extension; default: in benchmarks/results, with the date")
    arguments = parser.parse_args()
    reference = os.environ.get("VJEPA2_REFERENCE")
    about = environment(_CPU)
    report: dict[str, Any] = {
        "environment": about,
        "reference_commit": REFERENCE_COMMIT,
        "configs": [compare(_WORKLOADS[name], Path(reference) if reference else None) for name in arguments.configs],
    }
    out = arguments.out or ROOT / "benchmarks" / "results" / f"step_counts_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
