"""What encoders know of physics: trained on features, trained on pixels, untrained, and raw pixels beside them.

    python -m experiments.physics_probes --minutes 2 --seeds 3

For each seed the recipe `laptop` is trained on a pack of the clips of vjepa_fast.data.physics for so many minutes (or
steps) with each objective, with the schedules laid over the steps that fit: a few steps are timed first. Ridge
regression then reads each quantity out of frozen features; it is fitted on the training videos and scored on other
files. Two read-outs: the mean over a clip's tokens, and the tokens of its last frames side by side, which keeps places
apart (positions are lost in the mean, rotary positions being relative). Written: a table (.md), all figures (.json) and
a picture (.png).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vjepa_fast as vf
from experiments import RESULTS
from experiments.physics_tables import CLASSES, OBJECTIVES, QUANTITIES, gather, lengths, margins, plot, ranks, table
from vjepa_fast.config.schema import Config, DataConfig
from vjepa_fast.data.decode.index import load_index
from vjepa_fast.data.decode.pyav import decode_clip
from vjepa_fast.data.decode.request import ClipRequest, VideoSource
from vjepa_fast.data.generated.physics import PhysicsSet, load_physics_labels, make_physics
from vjepa_fast.data.generated.physics_scenes import KINDS
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.writer import make_pack
from vjepa_fast.data.sampling import Box, clip_step
from vjepa_fast.evaluation.linear_probe import Decomposition, Ridge
from vjepa_fast.evaluation.physics_targets import behind
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.train.monitor.health import effective_ranks
from vjepa_fast.train.trainer import Trainer

HIDDEN = {0: "none", 3: "main", 4: "other", 5: "both"}
"""Classes of `hidden`, of those of physics_targets.behind; the rest are too rare."""

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
    """float64 [N, C], or of CLASSES int64 [N], -1 for none of them."""


def read_split(manifest: Path, cfg: DataConfig, starts: int = 5) -> Split:
    """Some clips of each video of a manifest, whole frames, that begin evenly spread over it."""
    labels = load_physics_labels(manifest)
    classes = {number: i for i, number in enumerate(HIDDEN)}
    clips: list[Tensor] = []
    values: dict[str, list[Any]] = {name: [] for name in QUANTITIES}
    for path in read_manifest(str(manifest))[0]:
        index, truth = load_index(path, cfg.cache_dir), labels[path]
        num_frames = cfg.dataset_fpcs[0]
        step = clip_step(
            index.avg_fps,
            num_frames,
            fps=cfg.fps,
            duration=cfg.duration,
            frame_step=cfg.frame_step,
            round_fps=cfg.round_fps,
        )
        for first in np.linspace(0, max(0, index.num_frames - 1 - (num_frames - 1) * step), starts).astype(int):
            frames = np.minimum(first + step * np.arange(num_frames), index.num_frames - 1)
            whole = Box(0, 0, index.height, index.width)
            clips.append(decode_clip(ClipRequest(VideoSource(path, index), frames, whole, cfg.crop_size, flip=False)))
            last = frames[-1]
            contact = truth["contact_in"][last, 0]
            values["position"].append(truth["position"][last, 0])
            values["velocity"].append(truth["velocity"][frames[0] : last + 1, 0].mean(0))
            values["time to contact"].append([LONGEST if np.isnan(contact) else min(contact, LONGEST)])
            values["law"].append(KINDS.index(truth["kind"]))
            values["hidden"].append(classes.get(behind(truth, last), -1))
    tensors = {name: torch.tensor(np.array(value)) for name, value in values.items()}
    return Split(torch.stack(clips), tensors)


@lru_cache(maxsize=2)
def _split(manifest: Path, data: str) -> Split:
    """read_split, not again for the next encoder of the same settings; data: of the config, as JSON."""
    return read_split(manifest, DataConfig.model_validate_json(data))


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
        decomposed = Decomposition.of(x[name])
        found[name] = {
            q: _balanced(x[name], train.values[q], x_test[name], test.values[q], CLASSES[q])
            if q in CLASSES
            else decomposed.fit(train.values[q]).r2(x_test[name], test.values[q])
            for q in QUANTITIES
        }
    return found


def _balanced(x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor, num: int) -> float:
    """Mean of the accuracies of all classes, of a classifier that has seen as many of each; nan without one of them."""
    kinds = [torch.nonzero(labels == kind).flatten() for kind in range(num)]
    count = min(map(len, kinds))
    asked = [labels_test == kind for kind in range(num)]
    if count < 2 or not all(rows.any() for rows in asked):
        return float("nan")
    chosen = torch.cat([rows[:: max(1, len(rows) // count)][:count] for rows in kinds])
    answers = Ridge.fit(x[chosen], F.one_hot(labels[chosen], num))(x_test).argmax(1)
    return sum(float((answers[rows] == kind).double().mean()) for kind, rows in enumerate(asked)) / num


def config(objective: str, seed: int, videos: Path, num_steps: int, changes: list[str]) -> Config:
    """The recipe `laptop` with its schedules laid over num_steps, a tenth of them warm-up."""
    return vf.load_recipe(
        "laptop",
        [
            f"data.datasets=[{json.dumps(str(videos))}]",
            f"model.objective={objective}",
            f"train.seed={seed}",
            f"optimization.ipe={max(1, num_steps // 10)}",
            "train.checkpoint_every=1000000",
            *changes,
        ],
    )


def train(
    objective: str, seed: int, videos: Path, num_steps: int, folder: Path, changes: list[str]
) -> tuple[Trainer, float]:
    """Train; the trainer, and seconds a step."""
    folder.mkdir(parents=True)
    trainer = Trainer(config(objective, seed, videos, num_steps, changes), folder=folder)
    summary = trainer.fit()
    return trainer, trainer.task.global_batch / summary.clips_per_s


@torch.no_grad()
def effective_rank(encoder: VisionTransformer, clips: Tensor) -> float:
    """In how many directions the tokens of clips differ, as the log of a run has it."""
    out = encoder.eval()(clips)
    assert isinstance(out, Tensor)
    return float(effective_ranks([out.flatten(0, 1)])[0])


def pack_videos(made: PhysicsSet, folder: Path) -> None:
    """All frames of the training videos."""
    settings = PackSettings(fps=12, short_side=96, quality=95)
    make_pack(*read_manifest(str(made.train_csv)), folder, settings, num_workers=1)


@dataclass(frozen=True)
class Job:
    """One encoder: which, where its clips are and for how long it is trained."""

    objective: str
    """One of OBJECTIVES, or `untrained`."""
    seed: int
    minutes: float
    steps: int | None
    threads: int
    changes: list[str]
    labelled: PhysicsSet
    """What the read-outs are fitted and scored on."""
    pack: Path
    """Of the training videos: decoding would take half of the time of so small a model."""
    folder: Path


def run(job: Job) -> dict[str, Any]:
    """Train and score one encoder; what the same job has left before is taken as it is.

    Of a job that differs in `labelled` alone the encoder is taken, and scored anew.
    """
    torch.set_num_threads(job.threads)
    folder = job.folder / f"{job.objective}_{job.seed}"
    kept, checkpoint = folder / "found.json", folder / "run" / "latest.pt"
    about = {"objective": job.objective, "seed": job.seed, "changes": job.changes}
    labelled = [len(read_manifest(str(manifest))[0]) for manifest in (job.labelled.train_csv, job.labelled.val_csv)]
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    same = found | about == found
    if same and found.get("labelled") == labelled:
        return found
    # What encoders are built and clips read with, the same for all seeds.
    cfg = config("latent", 0, job.pack, 20, job.changes)
    encoders: dict[str, VisionTransformer] = {}
    names = {"encoder": "encoder"} | ({"target encoder": "target_encoder"} if job.objective == "latent" else {})
    if job.objective == "untrained":
        folder.mkdir(parents=True, exist_ok=True)
        found = dict(about)
        torch.manual_seed(job.seed)
        encoders["encoder"] = vf.VJEPA.from_config(cfg).encoder
    elif same and checkpoint.exists():
        encoders |= {name: vf.load(checkpoint, weights=key, predictor=False).encoder for name, key in names.items()}
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        num_steps = job.steps
        if num_steps is None:
            _, pace = train(job.objective, job.seed, job.pack, WARM_UP + TIMED, folder / "timed", job.changes)
            num_steps = max(20, int(60 * job.minutes / pace))
        began = time.perf_counter()
        trainer, _ = train(job.objective, job.seed, job.pack, num_steps // 10 * 10, folder / "run", job.changes)
        found = {**about, "steps": trainer.step, "minutes": (time.perf_counter() - began) / 60}
        found["log"] = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        encoders |= {name: getattr(trainer.model, key) for name, key in names.items()}
    found["labelled"] = labelled
    splits = [
        _split(manifest, cfg.data.model_dump_json()) for manifest in (job.labelled.train_csv, job.labelled.val_csv)
    ]
    found["rank"] = {name: effective_rank(encoder, splits[1].clips[:64]) for name, encoder in encoders.items()}
    found["scores"] = {
        name: scores(splits[0], splits[1], *(features(encoder, split.clips) for split in splits))
        for name, encoder in encoders.items()
    }
    if job.objective == "untrained" and job.seed == 0:
        found["pixels"] = scores(splits[0], splits[1], *(pixels(split.clips) for split in splits))["all"]
        found["clips"] = [len(split.clips) for split in splits]
    kept.write_text(json.dumps(found))
    return found


def versions() -> str:
    """Of what ran."""
    return f"python {platform.python_version()}, torch {torch.__version__}, vjepa_fast {vf.__version__}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What encoders know of physics.")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each objective and seed")
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", type=int, nargs=2, default=(400, 200), metavar=("TRAIN", "VAL"))
    parser.add_argument(
        "--labelled",
        type=int,
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="videos that read-outs are fitted and scored on; default: those of --videos. With more of "
        "them scores are higher and steadier, the encoders are the same",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--work", type=Path, help="folder of videos and runs; the same command goes on there")
    parser.add_argument("--out", type=Path, help="without suffix; default benchmarks/results/physics_probes_...")
    return parser.parse_args()


def main() -> None:
    """Train, probe, write."""
    args = _arguments()
    length = f"{args.steps}_steps" if args.steps else f"{args.minutes:g}_min"
    out = args.out or RESULTS / f"physics_probes_{length}_cpu_{date.today()}"
    threads = max(1, torch.get_num_threads() // args.jobs)
    with tempfile.TemporaryDirectory() as name:
        folder = args.work or Path(name)
        made = make_physics(folder / "videos", *args.videos)
        pack_videos(made, folder / "pack")
        labelled = make_physics(folder / "labelled", *args.labelled) if args.labelled else made
        jobs = [
            Job(
                objective, seed, args.minutes, args.steps, threads, args.set, labelled, folder / "pack", folder / length
            )
            for seed in range(args.seeds)
            for objective in (*OBJECTIVES, "untrained")
        ]
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            runs = list(pool.map(run, jobs))
    rows = gather(runs)
    given = [
        f"--{'steps' if args.steps else 'minutes'} {args.steps or format(args.minutes, 'g')}",
        f"--seeds {args.seeds} --jobs {args.jobs}",
        *([f"--labelled {args.labelled[0]} {args.labelled[1]}"] if args.labelled else []),
        *(["--set", *map(repr, args.set)] if args.set else []),
    ]
    counts = next(one["clips"] for one in runs if "clips" in one)
    about = {
        "command": f"python -m experiments.physics_probes {' '.join(given)}",
        "date": str(date.today()),
        "versions": versions(),
        "hardware": f"CPU, {args.jobs} runs at a time, {threads} threads each",
        "clips": f"{counts[0]} to fit, {counts[1]} of other files to score",
    }
    figures = {**about, "rows": rows, "runs": runs}
    out.with_name(out.name + ".json").write_text(json.dumps(figures, indent=1) + "\n")
    head = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = (
        f"# Physical quantities in frozen features\n\n{head}\n- trained: {lengths(runs)}\n\nOf the main disc: R2 of "
        "its place in the last frame, its mean velocity over the clip and the time to its next contact (up to "
        f"{LONGEST:g} s). Balanced accuracy, 0.25 by chance: which disc is hidden at the end "
        f"({', '.join(HIDDEN.values())}), and the law ({', '.join(KINDS)}). `mean` of all tokens, or the tokens "
        f"of the `last` frames side by side. Mean over {args.seeds} seeds, and their spread.\n\n{table(rows)}\n\n"
        "What training adds, and how many standard deviations of the difference between two seeds that is.\n\n"
        f"{margins(rows)}\n\nEffective rank of the tokens: {ranks(runs)}.\n"
    )
    out.with_name(out.name + ".md").write_text(text)
    plot(rows, out.with_name(out.name + ".png"))
    print(text)


if __name__ == "__main__":
    main()
