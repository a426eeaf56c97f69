"""Training runs side by side: loss curves in one picture, losses and probe scores in one table.

    python -m benchmarks.compare_runs runs/fp32 runs/bf16 --out benchmarks/results/demo_dtypes_cpu_<date>

A run is called by the name of its folder. The table has the loss as a mean over the first, the middle and the last
tenth of the steps, and the velocity probe where the run has one (the demo's).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vjepa_fast.bench.timing import environment
from vjepa_fast.common import markdown
from vjepa_fast.train.monitor.metrics import read_csv


def losses_of(folder: Path) -> np.ndarray:
    """[steps] losses of a run.

    Raises:
        ValueError: the folder has no log.
    """
    rows = read_csv(folder / "log_r0.csv")
    if not rows:
        raise ValueError(f"{folder} has no log_r0.csv with a step in it; expected a run folder")
    return np.array([float(row["loss"]) for row in rows])


def summary(folder: Path) -> dict[str, Any]:
    """Figures of one run."""
    losses = losses_of(folder)
    tenth = max(1, len(losses) // 10)
    middle = (len(losses) - tenth) // 2
    found = {
        "name": folder.name,
        "steps": len(losses),
        "first": losses[:tenth].mean(),
        "middle": losses[middle : middle + tenth].mean(),
        "last": losses[-tenth:].mean(),
        "velocity_r2": None,
    }
    probe = folder / "probe.json"
    if probe.exists():
        found["velocity_r2"] = json.loads(probe.read_text())["trained encoder"]["velocity_r2"]
    return found


def as_markdown(runs: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """A page for people."""
    lines = [
        "# Runs side by side",
        "",
        f"- hardware: {about['cpu']}, {about['cores']} cores",
        f"- versions: python {about['python']}, torch {about['torch']}, vjepa_fast {about['vjepa_fast']}",
        f"- command: `{about['command']}`",
        f"- date: {about['date']}",
        "",
        *markdown.table(
            ["run", "steps", "loss, first tenth", "middle tenth", "last tenth", "velocity R2"],
            [
                [
                    run["name"],
                    run["steps"],
                    *(f"{run[part]:.4f}" for part in ("first", "middle", "last")),
                    "" if run["velocity_r2"] is None else f"{run['velocity_r2']:.2f}",
                ]
                for run in runs
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def smooth(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """[steps] means of the last ten."""
    values = np.asarray(losses)
    return np.array([values[max(0, i - 9) : i + 1].mean() for i in range(len(values))])


def plot_losses(runs: Iterable[tuple[str, Sequence[float] | np.ndarray, dict[str, Any]]], out: Path) -> None:
    """Smoothed loss curves on one axis: name, losses and the look of each (of matplotlib's plot)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, losses, look in runs:
        axis.plot(np.arange(1, len(losses) + 1), smooth(losses), label=name, **look)
    axis.set(xlabel="step", ylabel="loss, mean of 10 steps", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def plot(folders: list[Path], out: Path) -> None:
    """Loss curves of runs; neighbours share a colour."""
    plot_losses(
        [
            (
                folder.name,
                losses_of(folder),
                {"linestyle": "--" if place % 2 else "-", "color": f"C{place // 2}", "linewidth": 1.5},
            )
            for place, folder in enumerate(folders)
        ],
        out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; neighbours share a colour, two by two")
    parser.add_argument("--out", type=Path, required=True, help="without extension")
    arguments = parser.parse_args()
    try:
        runs = [summary(folder) for folder in arguments.runs]
    except ValueError as error:
        sys.exit(f"error: {error}")
    about = environment(torch.device("cpu"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps({"environment": about, "runs": runs}, indent=1) + "\n")
    page = as_markdown(runs, about)
    arguments.out.with_suffix(".md").write_text(page)
    plot(arguments.runs, arguments.out.with_suffix(".png"))
    print(page)


if __name__ == "__main__":
    main()
