"""What encoders know of physics: trained on features, trained on pixels, untrained, and raw pixels beside them.

    python -m benchmarks.physics_probes --minutes 2 --seeds 3

For each seed the demo's model is trained on the clips of vjepa_fast.data.physics for so many minutes with each
objective, with the schedules laid over the steps that fit: a few steps are timed first. Ridge regression then reads
each quantity out of frozen features; it is fitted on the training videos and scored on other files. Two read-outs: the
mean over a clip's tokens, and the tokens of its last frames side by side, which keeps places apart (positions are lost
in the mean, rotary positions being relative). Written: a table (.md), all figures (.json) and a picture (.png).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vjepa_fast as vf
from vjepa_fast.config.schema import Config, DataConfig
from vjepa_fast.data.decode.index import load_index
from vjepa_fast.data.decode.pyav import decode_clip
from vjepa_fast.data.decode.request import ClipRequest, VideoSource
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.physics import PhysicsSet, load_physics_labels, make_physics
from vjepa_fast.data.sampling import Box, clip_step
from vjepa_fast.evaluation.linear_probe import accuracy, r2
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.train.trainer import Trainer

QUANTITIES = ("position", "velocity", "time to contact", "hidden")
"""Of the main disc in the last frame of a clip; the first three as R2, the last as balanced accuracy."""

LONGEST = 2.0
"""Seconds: a contact later than this is as good as none."""

WARM_UP = 5
TIMED = 15
"""Steps that are not timed, and that are."""


@dataclass
class Split:
    """Clips and what is true of them; Legend: N clips."""

    clips: Tensor
    """uint8 [N, T, H, W, 3]."""
    values: dict[str, Tensor]
    """float64 [N, C], or for `hidden` int64 [N]."""


def read_split(manifest: Path, cfg: DataConfig, starts: int = 3) -> Split:
    """Some clips of each video of a manifest, whole frames, that begin evenly spread over it."""
    labels = load_physics_labels(manifest)
    clips: list[Tensor] = []
    values: dict[str, list[Any]] = {name: [] for name in QUANTITIES}
    for path in read_manifest(str(manifest))[0]:
        index, truth = load_index(path, cfg.cache_dir), labels[path]
        num_frames = cfg.dataset_fpcs[0]
        step = clip_step(index.avg_fps, num_frames, fps=cfg.fps, duration=cfg.duration, frame_step=cfg.frame_step,
                         round_fps=cfg.round_fps)
        for first in np.linspace(0, max(0, index.num_frames - 1 - (num_frames - 1) * step), starts).astype(int):
            frames = np.minimum(first + step * np.arange(num_frames), index.num_frames - 1)
            whole = Box(0, 0, index.height, index.width)
            clips.append(decode_clip(ClipRequest(VideoSource(path, index), frames, whole, cfg.crop_size, flip=False)))
            last = frames[-1]
            contact = truth["contact_in"][last, 0]
            values["position"].append(truth["position"][last, 0])
            values["velocity"].append(truth["velocity"][last, 0])
            values["time to contact"].append([LONGEST if np.isnan(contact) else min(contact, LONGEST)])
            values["hidden"].append(int(truth["hidden_by"][last][0] is not None))
    tensors = {name: torch.tensor(np.array(value)) for name, value in values.items()}
    return Split(torch.stack(clips), tensors)


@torch.no_grad()
def features(encoder: VisionTransformer, clips: Tensor) -> dict[str, Tensor]:
    """fp32, by read-out: `mean` [N, D], `last` [N, tokens of the last place in time * D]."""
    encoder = encoder.eval()
    mean, last = [], []
    for some in clips.split(32):
        out = encoder(some.to(next(encoder.parameters()).device))
        assert isinstance(out, Tensor)
        grid = encoder.grid_of(some)
        mean.append(out.float().mean(1).cpu())
        last.append(out[:, -grid[1] * grid[2] :].float().flatten(1).cpu())
    return {"mean": torch.cat(mean), "last": torch.cat(last)}


def pixels(clips: Tensor) -> dict[str, Tensor]:
    """Shrunk to 16 x 16: all frames."""
    small = F.interpolate(clips.flatten(0, 1).permute(0, 3, 1, 2).float(), size=(16, 16), mode="area")
    return {"all": small.reshape(len(clips), -1)}


def scores(train: Split, test: Split, x: dict[str, Tensor], x_test: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """By read-out and quantity."""
    found: dict[str, dict[str, float]] = {}
    for name in x:
        found[name] = {
            q: r2(x[name], train.values[q], x_test[name], test.values[q]) for q in QUANTITIES if q != "hidden"}
        hidden, truth = train.values["hidden"], test.values["hidden"]
        found[name]["hidden"] = _balanced(x[name], hidden, x_test[name], truth)
    return found


def _balanced(x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor) -> float:
    """Mean of the accuracies of both classes, of a classifier that has seen as many of each; nan without one."""
    kinds = [torch.nonzero(labels == kind).flatten() for kind in (0, 1)]
    count = min(map(len, kinds))
    if count < 2 or len(labels_test.unique()) < 2:
        return float("nan")
    chosen = torch.cat([rows[:: max(1, len(rows) // count)][:count] for rows in kinds])
    found = [accuracy(x[chosen], labels[chosen], x_test[labels_test == kind], labels_test[labels_test == kind])
             for kind in (0, 1)]
    return sum(found) / 2


def config(objective: str, seed: int, csv: Path, num_steps: int, changes: list[str]) -> Config:
    """The demo's model and schedules laid over num_steps, a tenth of them warm-up."""
    return vf.load_recipe("demo", [
        f"data.datasets=[{json.dumps(str(csv))}]", f"model.objective={objective}", f"train.seed={seed}",
        "train.probe=false", f"optimization.ipe={max(1, num_steps // 10)}", "train.checkpoint_every=1000000", *changes])


def train(
    objective: str, seed: int, csv: Path, num_steps: int, folder: Path, changes: list[str]
) -> tuple[Trainer, float]:
    """Train; the trainer, and seconds a step."""
    folder.mkdir(parents=True)
    trainer = Trainer(config(objective, seed, csv, num_steps, changes), folder=folder)
    summary = trainer.fit()
    return trainer, trainer.global_batch / summary.clips_per_s


def run_seed(seed: int, made: PhysicsSet, splits: tuple[Split, Split], args: argparse.Namespace,
             folder: Path) -> dict[str, Any]:
    """Scores of one seed, by what was trained."""
    found: dict[str, Any] = {}
    encoders: dict[str, VisionTransformer] = {}
    for objective in ("latent", "pixels"):
        num_steps = args.steps
        if num_steps is None:
            _, pace = train(objective, seed, made.train_csv, WARM_UP + TIMED, folder / f"{objective}_timed", args.set)
            num_steps = max(20, int(60 * args.minutes / pace))
        began = time.perf_counter()
        trainer, _ = train(objective, seed, made.train_csv, num_steps // 10 * 10, folder / objective, args.set)
        found[objective] = {"steps": trainer.step, "minutes": (time.perf_counter() - began) / 60}
        encoders[objective] = trainer.model.encoder
    torch.manual_seed(seed)
    encoders["untrained"] = copy.deepcopy(vf.VJEPA(trainer.cfg.model).encoder)
    for name, encoder in encoders.items():
        inputs = [features(encoder, split.clips) for split in splits]
        found.setdefault(name, {})["scores"] = scores(*splits, *inputs)
    return found


def gather(runs: list[dict[str, Any]], raw: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Row of the table -> quantity -> one value a seed."""
    rows: dict[str, dict[str, list[float]]] = {}
    for name in ("latent", "pixels", "untrained"):
        for read_out in ("mean", "last"):
            rows[f"{name}, {read_out}"] = {
                q: [run[name]["scores"][read_out][q] for run in runs] for q in QUANTITIES}
    rows["raw pixels, 16 x 16, all frames"] = {q: [raw["all"][q]] for q in QUANTITIES}
    return rows


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean, and the spread from the least to the largest seed."""
    lines = [f"| features | {' | '.join(QUANTITIES)} |", "|---" * (len(QUANTITIES) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{np.mean(v):.2f}" + (f" ({min(v):.2f} to {max(v):.2f})" if len(v) > 1 else "") for v in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Bars with the spread of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 4 * len(QUANTITIES), 4
    figure, panels = plt.subplots(1, len(QUANTITIES), figsize=size, layout="constrained", sharey=True)
    names = list(rows)
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        values = [np.array(rows[name][quantity]) for name in names]
        means = np.array([v.mean() for v in values])
        spread = np.array([[m - v.min(), v.max() - m] for m, v in zip(means, values, strict=True)]).T
        axes.barh(names, means.clip(-0.2), xerr=spread, color=[f"C{i // 2}" for i in range(len(names))])
        axes.set(title=quantity, xlabel="balanced accuracy" if quantity == "hidden" else "R2", xlim=(-0.2, 1))
        axes.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Train, probe, write."""
    parser = argparse.ArgumentParser(description="What encoders know of physics.")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each objective and seed")
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", type=int, nargs=2, default=(400, 200), metavar=("TRAIN", "VAL"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the demo recipe")
    parser.add_argument("--out", type=Path, help="without suffix; default benchmarks/results/physics_probes_...")
    args = parser.parse_args()
    length = f"{args.steps}_steps" if args.steps else f"{args.minutes:g}_min"
    out = args.out or Path(__file__).parent / "results" / f"physics_probes_{length}_cpu_{date.today()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_physics(folder / "videos", *args.videos)
        data = config("latent", 0, made.train_csv, 20, args.set).data
        splits = read_split(made.train_csv, data), read_split(made.val_csv, data)
        raw = scores(*splits, *(pixels(split.clips) for split in splits))
        runs = [run_seed(seed, made, splits, args, folder / str(seed)) for seed in range(args.seeds)]
    rows = gather(runs, raw)
    command = f"python -m benchmarks.physics_probes --{'steps' if args.steps else 'minutes'} " + (
        f"{args.steps or args.minutes} --seeds {args.seeds}")
    about = {"command": command, "date": str(date.today()),
             "versions": f"python {platform.python_version()}, torch {torch.__version__}, vjepa_fast {vf.__version__}",
             "hardware": f"CPU, {torch.get_num_threads()} threads",
             "clips": f"{len(splits[0].clips)} to fit, {len(splits[1].clips)} of other files to score"}
    figures = {**about, "runs": runs, "raw pixels": raw}
    out.with_name(out.name + ".json").write_text(json.dumps(figures, indent=1) + "\n")
    trained = ("latent", "pixels")
    steps = ", ".join(f"{name} {np.mean([run[name]['steps'] for run in runs]):.0f}" for name in trained)
    head = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = (
        f"# Physical quantities in frozen features\n\n{head}\n- steps: {steps}\n\nOf the main disc in the last "
        f"frame of a clip: R2 of position, velocity and time to contact (up to {LONGEST:g} s), balanced accuracy of "
        "`hidden` (0.5 is chance). `mean` of all tokens, or the tokens of the `last` frames side by side. Mean over "
        f"{args.seeds} seeds, and their spread.\n\n{table(rows)}\n")
    out.with_name(out.name + ".md").write_text(text)
    plot(rows, out.with_name(out.name + ".png"))
    print(text)


if __name__ == "__main__":
    main()
