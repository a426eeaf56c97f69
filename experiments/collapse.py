"""Five ways to make the demo collapse, and five seeds of the demo as it is: what the warnings say, and when.

    python -m experiments.collapse

writes benchmarks/results/collapse_cpu_2026-11-27.{json,md}. The videos are the demo's, made once; all runs train for
NUM_STEPS of its 320 steps, with its schedules.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vjepa_fast as vf
from experiments import RESULTS
from vjepa_fast.common import markdown
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.jepa import VJEPA, JEPAOutput
from vjepa_fast.ops.latent_loss import target_features
from vjepa_fast.train.trainer import Trainer

NUM_STEPS = 100
SEEDS = (0, 1, 2, 3, 4)
SHOWN = (
    "loss",
    "target_std",
    "target_rank",
    "context_std",
    "context_rank",
    "prediction_std",
    "explained",
    "clip_cosine",
)


class WithoutStopGradient(VJEPA):
    """The encoder makes the targets itself, and the loss sends gradients through them."""

    def forward(self, clips: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]) -> JEPAOutput:
        output = super().forward(clips, masks)
        groups = [clips] if isinstance(clips, Tensor) else list(clips)
        features, _ = self.encoder.forward_packed(groups, final_norm=False)
        norm = self.encoder.norm
        # target_features of the encoder's own, with a gradient.
        rows = F.layer_norm(features[output.target_rows], norm.weight.shape, norm.weight, norm.bias, norm.eps)
        distance = output.packed_predictions - F.layer_norm(rows, norm.weight.shape)
        weights = torch.cat([batch.token_weights(len(output.masks)) for batch in output.masks])
        output.loss = (distance.abs().pow(self.loss_exp).mean(-1) * weights).sum() / self.loss_exp
        output.features, output.final_norm = features.detach(), (norm.weight.detach(), norm.bias.detach(), norm.eps)
        assert target_features(output.features, output.target_rows, output.final_norm).shape == distance.shape
        return output


@dataclass(frozen=True)
class Case:
    """A run, and what the first warning should name; None: there should be none."""

    name: str
    expected: str | None = None
    changes: tuple[str, ...] = ()
    seed: int = 239
    sabotage: Callable[[Trainer], None] | None = None


def _let_gradients_through(trainer: Trainer) -> None:
    trainer.model.__class__ = WithoutStopGradient


PROVOKED = (
    Case("momentum 0", "momentum", ("optimization.ema=[0.0, 0.0]",)),
    Case("learning rate x 10", "learning rate", ("optimization.lr=2.0e-2",)),
    Case("gradients reach the targets", "gradient", sabotage=_let_gradients_through),
    Case("weight decay 50", "weight decay", ("optimization.weight_decay=50", "optimization.final_weight_decay=50")),
    Case("penalty on predictions 10", "penalty", ("loss.prediction_l2=10",)),
)
HEALTHY = tuple(Case(f"demo, seed {seed}", seed=seed) for seed in SEEDS)


def run(case: Case, folder: Path, num_steps: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Train, and collect the warnings and the figures of the last step."""
    cfg = vf.load_recipe(
        "demo",
        [
            *case.changes,
            f"train.seed={case.seed}",
            f"train.max_steps={num_steps}",
            "train.log_every=10",
            "train.probe=false",
            "train.checkpoint_every=1000000",
            *changes,
        ],
    )
    folder.mkdir(parents=True)
    trainer = Trainer(cfg, folder=folder)
    if case.sabotage is not None:
        case.sabotage(trainer)
    trainer.fit()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    path = folder / "warnings.jsonl"
    warnings = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        "name": case.name,
        "changes": list(case.changes),
        "seed": case.seed,
        "expected": case.expected,
        "named": warnings[0]["cause"] if warnings else None,
        "warnings": warnings,
        "rows": [{key: row[key] for key in ("step", *SHOWN)} for row in rows],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns = (
        "run",
        "first warning at step",
        "seen",
        "cause named",
        "expected",
        "target std",
        "target rank",
        "context rank",
        "explained",
    )
    rows = []
    for r in results:
        last, first = r["rows"][-1], (r["warnings"] or [{"step": "none", "kind": "", "cause": ""}])[0]
        rows.append(
            [
                r["name"],
                *(first[key] for key in ("step", "kind", "cause")),
                r["expected"] or "none",
                f"{last['target_std']:.3f}",
                f"{last['target_rank']:.1f}",
                f"{last['context_rank']:.1f}",
                f"{last['explained']:.2f}",
            ]
        )
    return "\n".join(markdown.table(columns, rows))


def main() -> None:
    """Run all ten."""
    parser = argparse.ArgumentParser(description="Ten short runs of the demo, five of them made to collapse.")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--only", metavar="NAME", help="one of the runs, into a file of its own")
    parser.add_argument("--out", type=Path, default=RESULTS / "collapse_cpu_2026-11-27")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = [case for case in (*PROVOKED, *HEALTHY) if args.only in (None, case.name)]
        for number, case in enumerate(chosen):
            results.append(run(case, Path(folder) / str(number), args.steps))
    about = {
        "command": f"python -m experiments.collapse --steps {args.steps}"
        + (f" --only '{args.only}'" if args.only else ""),
        "date": str(date.today()),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, vjepa_fast {vf.__version__}",
        "hardware": f"CPU, {torch.get_num_threads()} threads",
    }
    args.out.with_suffix(".json").write_text(json.dumps({**about, "runs": results}, indent=1) + "\n")
    said = "\n".join(f"- {r['name']}: step {w['step']}: {w['warning']}" for r in results for w in r["warnings"])
    head = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in about.items())
    right = sum(r["named"] == r["expected"] for r in results)
    text = (
        f"# Collapses provoked in the demo\n\n{head}\n\n{right} of {len(results)} runs were judged as expected. "
        "The last four columns are of the last step; `explained` is the share of the targets' variance that is "
        f"predicted.\n\n{table(results)}\n\nWhat the warnings said:\n\n{said}\n"
    )
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
