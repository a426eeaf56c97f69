"""ViT-B learns simple physics on one GPU: our training at full speed, and the reference's step on the same batches.

    VJEPA2_REFERENCE=/path/to/vjepa2 python -m experiments.learn_on_gpu --steps 1000

Ours is what `vjepa-fast train` runs, reading a pack; then the reference's modules, loss, AdamW and schedules (without
recomputing activations, cuDNN's attention off) see the same clips and masks from the same weights, in bf16 autocast.
Both encoders and an untrained one are probed as in experiments.physics_probes. Results go to
benchmarks/results/learn_<device>_<date>, or where --out says.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vjepa_fast as vf
from benchmarks.compare_runs import losses_of, plot_losses
from experiments.learn_beside_reference import FedReference
from experiments.physics_probes import QUANTITIES, Split, effective_rank, features, pack_videos, read_split, scores
from vjepa_fast.bench.reference import REFERENCE_COMMIT
from vjepa_fast.bench.timing import ROOT, environment, pick_device, synchronize
from vjepa_fast.common import markdown
from vjepa_fast.config.schema import Config
from vjepa_fast.data.generated.physics import make_physics
from vjepa_fast.train.trainer import Trainer

SETTINGS = (
    "data.crop_size=128",
    "data.batch_size=32",
    "data.fps=12",
    "data.num_workers=10",
    "mask.group_size=null",
    "mask.truncate=batch_min",
    "loss.loss_exp=2",
    "optimization.grad_accumulation=1",
    "optimization.epochs=10",
    "optimization.schedule=warmup_cosine",
    "optimization.warmup=1",
    "optimization.anneal=0",
    "optimization.start_lr=1e-5",
    "optimization.lr=3e-4",
    "optimization.final_lr=1e-5",
    "optimization.ema=[0.996, 1.0]",
    "train.seed=0",
    "train.cuda_graphs=true",
    "train.log_every=50",
    "train.checkpoint_every=1000000",
)
"""On top of the recipe `one-gpu-vitb`, for a run of a thousand steps: the momentum and learning rate of short runs, and
masks cut to the shortest of a batch, which is all that the reference can do."""


def config(pack: Path, num_steps: int, changes: list[str]) -> Config:
    return vf.load_recipe(
        "one-gpu-vitb",
        [
            f"data.datasets=[{json.dumps(str(pack))}]",
            f"optimization.ipe={max(1, num_steps // 10)}",
            *SETTINGS,
            *changes,
        ],
    )


def train_ours(cfg: Config, folder: Path) -> tuple[Trainer, dict[str, Any]]:
    """As `vjepa-fast train` does."""
    folder.mkdir()
    trainer = Trainer(cfg, folder=folder)
    began = time.perf_counter()
    summary = trainer.fit()
    return trainer, {
        "losses": losses_of(folder).tolist(),
        "seconds": time.perf_counter() - began,
        "clips_per_s": summary.clips_per_s,
        "data_wait": summary.data_wait,
        "log": json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]),
        "peak_memory_gib": _peak(trainer.device),
    }


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def train_reference(cfg: Config, folder: Path, root: Path, limit_s: float) -> tuple[Any, dict[str, Any]]:
    """The reference's encoder, and what its training was like; batches, masks and initial weights are ours.

    It ends early after `limit_s` seconds; its schedules are those of the whole run."""
    trainer = Trainer(cfg, folder=folder)
    cfg, device, batches = trainer.cfg, trainer.device, iter(trainer.loader)
    first = next(batches)
    reference = FedReference(root, trainer, first, checkpointing=False, cudnn_attention=False)
    losses: list[Tensor] = []
    began = time.perf_counter()
    for step in range(trainer.total_steps):
        batch = first if step == 0 else next(batches)
        losses.append(reference(batch))
        # As often as ours reads its losses back: its own loop waits for every one.
        if step % cfg.train.log_every == 0 or step == trainer.total_steps - 1:
            synchronize(device)
            if time.perf_counter() - began > limit_s:
                break
    seconds = time.perf_counter() - began
    trainer.loader.close()
    encoder = trainer.model.encoder
    encoder.load_state_dict(reference.encoder_state())
    return encoder, {
        "losses": torch.stack(losses).tolist(),
        "seconds": seconds,
        "clips_per_s": trainer.task.global_batch * len(losses) / seconds,
        "peak_memory_gib": _peak(device),
    }


@torch.no_grad()
def probe(encoder: Any, splits: tuple[Split, Split]) -> dict[str, Any]:
    """Scores by read-out and quantity, and in how many directions the tokens differ."""
    device = next(encoder.parameters()).device
    there = [Split(split.clips, {key: value.to(device) for key, value in split.values.items()}) for split in splits]
    found = [{key: x.to(device) for key, x in features(encoder, split.clips).items()} for split in splits]
    return {
        "rank": effective_rank(encoder, splits[1].clips[:64].to(device)),
        "scores": scores(there[0], there[1], found[0], found[1]),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about, sides = report["environment"], report["sides"]
    lines = [
        "# ViT-B on the physics set, on a GPU",
        "",
        f"- hardware: {about['device']}, {about['cpu']}, {about['cores']} cores",
        f"- versions: python {about['python']}, torch {about['torch']}, triton {about['triton']}, vjepa_fast "
        f"{about['vjepa_fast']}, commit {about['commit']}; facebookresearch/vjepa2 at {REFERENCE_COMMIT}",
        f"- command: `VJEPA2_REFERENCE=... {about['command']}`",
        f"- date: {about['date']}",
        "",
    ]
    rows: list[list[str]] = []
    for label, key, form in (
        ("steps", "losses", len),
        ("clips/s, with loading and compiling", "clips_per_s", "{:.0f}".format),
        ("waits for clips", "data_wait", "{:.1%}".format),
        ("peak memory, GiB (of the reference with a copy of ours)", "peak_memory_gib", "{:.1f}".format),
    ):
        rows.append([label, *(str(form(side[key])) if side.get(key) is not None else "" for side in sides.values())])
    most = max(len(side.get("losses", [])) for side in sides.values())
    for end in sorted({most // 10, most // 4, most // 2, most}):
        told = [side.get("losses", [])[:end] for side in sides.values()]
        cells = [f"{np.mean(losses[-20:]):.4f}" if len(losses) == end else "" for losses in told]
        rows.append([f"loss, 20 steps to step {end}", *cells])
    for read_out in ("mean", "last"):
        for quantity in QUANTITIES:
            cells = [f"{side['probe']['scores'][read_out][quantity]:.2f}" for side in sides.values()]
            rows.append([f"{quantity} ({read_out})", *cells])
    rows.append(["effective rank", *(f"{side['probe']['rank']:.1f}" for side in sides.values())])
    lines += markdown.table(["", *sides], rows)
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    """Figures, page and picture; once more with the second side, so that a run cut off has the first."""
    out.with_name(out.name + ".json").write_text(json.dumps(report) + "\n")
    out.with_name(out.name + ".md").write_text(as_markdown(report))
    plot_losses(
        [(name, side["losses"], {}) for name, side in report["sides"].items() if "losses" in side],
        out.with_name(out.name + ".png"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--videos", type=int, nargs=2, default=(400, 200), metavar=("TRAIN", "VAL"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--reference-seconds", type=float, default=float("inf"), help="the reference stops then")
    parser.add_argument("--cpu", action="store_true", help="to try the command out")
    parser.add_argument("--work", type=Path, help="folder with videos, or for them")
    parser.add_argument("--out", type=Path, help="without suffix")
    args = parser.parse_args()
    root = os.environ.get("VJEPA2_REFERENCE")
    if not root:
        parser.error("VJEPA2_REFERENCE does not name a checkout of facebookresearch/vjepa2")
    device = pick_device("cpu" if args.cpu else "cuda")
    about = environment(device)
    name = "cpu" if args.cpu else torch.cuda.get_device_name().split()[-1].lower()
    out = args.out or ROOT / "benchmarks" / "results" / f"learn_{name}_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    sides: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        folder = args.work or Path(temporary)
        made = make_physics(folder / "videos", *args.videos)
        pack_videos(made, folder / "pack")
        cfg = config(folder / "pack", args.steps, [f"train.device={device.type}", *args.set])
        # Decoded while the first side trains.
        reading = [pool.submit(read_split, csv, cfg.data, 2) for csv in (made.train_csv, made.val_csv)]
        trainer, ours = train_ours(cfg, Path(temporary) / "ours")
        splits = reading[0].result(), reading[1].result()
        torch.manual_seed(0)
        with device:
            untrained = vf.VJEPA.from_config(cfg).encoder
        sides["ours"] = ours | {"probe": probe(trainer.model.encoder, splits)}
        sides["untrained"] = {"probe": probe(untrained, splits)}
        write({"environment": about, "sides": sides}, out)
        del trainer, untrained
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        encoder, reference = train_reference(cfg, Path(temporary) / "reference", Path(root), args.reference_seconds)
        sides["reference"] = reference | {"probe": probe(encoder, splits)}
    write({"environment": about, "sides": sides}, out)
    print(as_markdown({"environment": about, "sides": sides}))


if __name__ == "__main__":
    main()
