"""The demo trained by the reference's code and by ours: the same clips, masks, initial weights and number of steps.

    VJEPA2_REFERENCE=/path/to/vjepa2 python -m experiments.learn_beside_reference --seeds 3

One process. Both sides see batch after batch of the same loader: ours with the step of `vjepa-fast train`, the
reference with its own modules, loss, AdamW and schedules of its optimizer; its momentum's schedule is a line of its
training loop, so it is given ours, the same formula. The recipe is the demo's, except that masks are cut to the
shortest of a batch (`mask.truncate=batch_min`), which is all that the reference can do. fp32. Two runs that differ in
rounding only drift apart after some hundred steps, as two seeds do: the question is whether the curves and the probes
of the two sides differ by more than seeds do. Results go to benchmarks/results/learn_vs_reference_cpu_<date>.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vjepa_fast as vf
from benchmarks.compare_runs import plot_losses, smooth
from vjepa_fast.bench.reference import REFERENCE_COMMIT, ReferenceStep, normalise
from vjepa_fast.bench.timing import ROOT, environment
from vjepa_fast.common import markdown
from vjepa_fast.data.loader import Batch
from vjepa_fast.evaluation.demo import clips_of, probe_scores
from vjepa_fast.optim.schedules import Schedules
from vjepa_fast.train.trainer import Trainer

SIDES = ("reference", "ours")
SCORES = ("velocity_r2", "position_r2", "shape_accuracy")


class FedReference:
    """The reference's step on the batches of a trainer, from the weights that the trainer begins with.

    Args:
        root: checkout of facebookresearch/vjepa2.
        trainer: whose masks and schedule of the momentum it is given.
        first: any batch.
        options: of ReferenceStep.
    """

    def __init__(self, root: Path, trainer: Trainer, first: Batch, **options: bool) -> None:
        self.trainer = trainer
        # What ReferenceStep takes weights and first clips from.
        start: Any = SimpleNamespace(
            workload=SimpleNamespace(config=trainer.cfg, torch_dtype=getattr(torch, trainer.cfg.train.dtype)),
            clips=first.clips,
            masks=trainer.task.masks_of(first),
            model=trainer.model,
        )
        self.step = ReferenceStep(root, start, **options)
        self.schedules = Schedules(trainer.cfg.optimization)

    def __call__(self, batch: Batch) -> Tensor:
        """Train on a batch; the loss, on the device."""
        self.step.clips = [normalise(clips, torch.float32).contiguous() for clips in batch.clips]
        self.step.masks = [one.to_meta() for one in self.trainer.task.masks_of(batch)]
        self.step.momentum = self.schedules.momentum(batch.step)
        return self.step.train(0)

    def encoder_state(self) -> dict[str, Tensor]:
        """With the names of our encoder's."""
        backbone: Any = self.step.networks["encoder"].backbone
        return backbone.state_dict()


def train_both(seed: int, num_steps: int | None, folder: Path) -> dict[str, Any]:
    """Losses [steps] and probe scores of both sides, from one stream of batches."""
    cfg = vf.load_recipe("demo", [f"train.seed={seed}", "mask.truncate=batch_min", "train.device=cpu"])
    trainer = vf.Trainer(cfg, folder=folder)
    cfg, batches = trainer.cfg, iter(trainer.loader)
    first = next(batches)
    reference = FedReference(Path(os.environ["VJEPA2_REFERENCE"]), trainer, first, checkpointing=False)
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    total = min(num_steps or trainer.total_steps, trainer.total_steps)
    for step in range(total):
        batch = first if step == 0 else next(batches)
        losses["reference"].append(float(reference(batch)))
        losses["ours"].append(float(trainer.run_step(batch).loss))
    trainer.loader.close()
    theirs = copy.deepcopy(trainer.model)
    theirs.encoder.load_state_dict(reference.encoder_state())
    found = {
        "reference": probe_scores(cfg, theirs, clips_of(trainer.task)),
        "ours": probe_scores(cfg, trainer.model, clips_of(trainer.task)),
    }
    return {
        "seed": seed,
        "losses": losses,
        "untrained": found["ours"]["untrained encoder"],
        "scores": {side: scores["trained encoder"] for side, scores in found.items()},
    }


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def curves(runs: list[dict[str, Any]], side: str) -> np.ndarray:
    """[seeds, steps] losses, each the mean of the last ten."""
    return np.stack([smooth(run["losses"][side]) for run in runs])


def outside(runs: list[dict[str, Any]]) -> float:
    """Share of the steps at which the two means differ by more than the seeds' standard deviations together."""
    ours, theirs = curves(runs, "ours"), curves(runs, "reference")
    return float((np.abs(ours.mean(0) - theirs.mean(0)) > np.hypot(ours.std(0, ddof=1), theirs.std(0, ddof=1))).mean())


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about, runs = report["environment"], report["runs"]
    ours, theirs = (np.array([run["losses"][side] for run in runs]) for side in ("ours", "reference"))
    apart = np.abs(ours - theirs) / theirs
    lines = [
        "# The demo trained by the reference's code and by ours",
        "",
        f"- hardware: {about['cpu']}, {about['cores']} cores, {about['threads']} threads used",
        f"- versions: python {about['python']}, torch {about['torch']}, vjepa_fast {about['vjepa_fast']}, commit "
        f"{about['commit']}; facebookresearch/vjepa2 at {report['reference_commit']}",
        f"- command: `VJEPA2_REFERENCE=... {about['command']}`",
        f"- date: {about['date']}",
        "",
        f"{ours.shape[1]} steps of the demo recipe with `mask.truncate=batch_min`, fp32; both sides see the same clips",
        "and masks and start from the same weights. Mean and standard deviation over the seeds.",
        "",
    ]
    rows = []
    tenth = max(1, ours.shape[1] // 10)
    for name, part in (("loss, first tenth", slice(0, tenth)), ("loss, last tenth", slice(-tenth, None))):
        cells = [spread([float(np.mean(run["losses"][side][part])) for run in runs]) for side in SIDES]
        rows.append([name, *cells])
    for score in SCORES:
        cells = [spread([run["scores"][side][score] for run in runs]) for side in SIDES]
        rows.append([score, *cells, spread([run["untrained"][score] for run in runs])])
    lines += [
        *markdown.table(["", "reference", "ours", "untrained"], rows),
        "",
        "Largest relative difference of a step's loss up to step 10, 50, 100 and the last, worst seed: "
        + ", ".join(f"{apart[:, :upto].max():.1e}" for upto in (10, 50, 100, ours.shape[1]))
        + ".",
    ]
    if len(runs) > 1:
        lines.append(
            "Means over ten steps differ by more than the seeds' deviations at "
            f"{100 * outside(runs):.1f} % of the steps."
        )
    head = ["seed", "velocity R2, reference", "ours", "loss of the last tenth, reference", "ours"]
    by_seed = [
        [
            run["seed"],
            *(f"{run['scores'][side]['velocity_r2']:.2f}" for side in ("reference", "ours")),
            *(f"{np.mean(run['losses'][side][-tenth:]):.4f}" for side in ("reference", "ours")),
        ]
        for run in runs
    ]
    lines += ["", *markdown.table(head, by_seed)]
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], out: Path) -> None:
    """Curves of both sides, a colour a seed."""
    plot_losses(
        [
            (
                f"{side}, seed {run['seed']}",
                run["losses"][side],
                {
                    "linestyle": style,
                    "linewidth": width,
                    "alpha": 0.5 if side == "reference" else 1.0,
                    "color": f"C{place}" if side == "reference" else "black",
                },
            )
            for side, style, width in (("reference", "-", 3.0), ("ours", "--", 1.2))
            for place, run in enumerate(runs)
        ],
        out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: the whole demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without extension; default: in benchmarks/results, with the date")
    arguments = parser.parse_args()
    if not os.environ.get("VJEPA2_REFERENCE"):
        parser.error("VJEPA2_REFERENCE does not name a checkout of facebookresearch/vjepa2")
    torch.set_num_threads(arguments.threads)
    about = environment(torch.device("cpu"))
    out = arguments.out or ROOT / "benchmarks" / "results" / f"learn_vs_reference_cpu_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": about, "reference_commit": REFERENCE_COMMIT, "runs": []}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            report["runs"].append(train_both(seed, arguments.steps, Path(folder) / "run"))
        out.with_suffix(".json").write_text(json.dumps(report) + "\n")
        out.with_suffix(".md").write_text(as_markdown(report))
        plot(report["runs"], out.with_suffix(".png"))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
