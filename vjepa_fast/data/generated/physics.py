"""Labelled clips of simple physics, possible and impossible: real H.264 files for probes and for surprise.

    python -m vjepa_fast.data.physics --out DIR       or data.datasets=[physics:], or make_physics(DIR, 400, 200)

Four kinds of scenes in turn, each with a reddish main disc and a smaller bluish one, both striped: `bounce` (a wall
between them, edges all around), `collision` (one with the other), `occlusion` (they pass behind a screen and before or
behind one another) and `gravity` (they fall and bounce). In the split `surprise` every scene is there twice, once as it
should be and once with something impossible: the main disc vanishes, goes through the wall, or jumps.

Beside each manifest lies <split>_labels.json. For each video: kind, `violation` (null, or its kind and first frame),
the discs' radius, depth order and the boxes of wall and screen; for each frame and disc position, velocity (fractions
of the picture a second), `contact_in` (seconds to its next contact, null if none comes within HORIZON), `visible`
(share of its area that is seen) and `hidden_by` (what hides most of it where less than half is seen: the number of a
disc, `wall` or `screen`; else null).

Everything is a pure function of (seed, split, number of the video, size, frames, frames a second), and so is each file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.generated.physics_scenes import KINDS, render, simulate
from vjepa_fast.data.generated.synthetic import encode, write_text

_VERSION = 2
_MARKER = "complete.json"


@dataclass(frozen=True)
class PhysicsSet:
    """Three manifests that `data.datasets` accepts; labels are the kinds, or in `surprise` 1 for the impossible."""

    train_csv: Path
    val_csv: Path
    surprise_csv: Path


def make_physics(
    folder: Path,
    num_train: int,
    num_val: int,
    num_surprise: int = 0,
    seed: int = 0,
    *,
    size: int = 96,
    num_frames: int = 36,
    fps: int = 12,
) -> PhysicsSet:
    """Writes videos, manifests and labels, unless the folder already holds exactly these.

    Args:
        folder: created if missing.
        num_train, num_val, num_surprise: videos of each split; the last is even, pairs of possible and impossible ones.
        seed: of everything drawn.
        size: height and width, pixels, even.
        num_frames: per video.
        fps: frames per second; motion is by the second.

    Raises:
        UserError: a number that cannot be, or the folder cannot be written.
    """
    folder = Path(folder)
    counts = num_train, num_val, num_surprise
    if size < 16 or size % 2 or min(counts) < 0 or num_surprise % 2 or min(num_frames, fps) < 1:
        raise UserError(
            f"size {size}, {num_train} + {num_val} + {num_surprise} videos of {num_frames} frames at {fps} a second; "
            "expected an even size of at least 16, an even number of surprising videos, and frames"
        )
    made = PhysicsSet(folder / "train.csv", folder / "val.csv", folder / "surprise.csv")
    recipe = {
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "num_surprise": num_surprise,
        "seed": seed,
        "size": size,
        "num_frames": num_frames,
        "fps": fps,
    }
    try:
        if json.loads((folder / _MARKER).read_text()) == recipe:
            return made
    except (OSError, ValueError):
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).unlink(missing_ok=True)
        for split, (csv, count) in enumerate(
            ((made.train_csv, num_train), (made.val_csv, num_val), (made.surprise_csv, num_surprise))
        ):
            _make_split(csv, split, count, seed, size, num_frames, fps, pairs=split == 2)
        write_text(folder / _MARKER, json.dumps(recipe))
    except OSError as error:
        raise UserError(
            f"the clips cannot be written to {folder}: {error.strerror}; free some space or name another folder"
        ) from error
    return made


def _make_split(
    csv: Path, split: int, count: int, seed: int, size: int, num_frames: int, fps: int, pairs: bool
) -> None:
    folder = csv.with_suffix("")
    folder.mkdir(exist_ok=True)
    entries: dict[str, Any] = {}
    for video in range(count):
        number, impossible = (video // 2, bool(video % 2)) if pairs else (video, False)
        scene = simulate(seed, split, number, num_frames, fps, impossible)
        frames, visible, hidden_by = render(scene, seed, split, number, size)
        encode(folder / f"{video:05d}.mp4", frames, fps)
        entries[f"{folder.name}/{video:05d}.mp4"] = {
            "kind": scene.kind,
            "label": int(scene.violation is not None) if pairs else KINDS.index(scene.kind),
            "violation": None
            if scene.violation is None
            else dict(zip(("kind", "frame"), scene.violation, strict=True)),
            "radius": scene.radius.round(6).tolist(),
            "front": scene.front.tolist(),
            "boxes": scene.boxes,
            "position": scene.position.round(6).tolist(),
            "velocity": scene.velocity.round(6).tolist(),
            "contact_in": [[None if math.isnan(v) else round(v, 6) for v in row] for row in scene.contact_in.tolist()],
            "present": scene.present.tolist(),
            "visible": visible.round(4).tolist(),
            "hidden_by": hidden_by,
        }
    write_text(csv.with_name(f"{csv.stem}_labels.json"), json.dumps(entries))
    write_text(csv, "".join(f"{path} {entry['label']}\n" for path, entry in entries.items()))


def load_physics_labels(manifest: Path) -> dict[str, dict[str, Any]]:
    """Labels as the module docstring has them, by the path that load_datasets gives a video; lists of frames as arrays,
    null in them as nan.

    Raises:
        UserError: there are no labels beside the manifest.
    """
    manifest = Path(manifest)
    file = manifest.with_name(f"{manifest.stem}_labels.json")
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no labels at {file} ({error}); expected a manifest written by make_physics") from error
    folder = os.path.dirname(os.path.abspath(manifest))
    for entry in entries.values():
        for name in ("radius", "position", "velocity", "contact_in", "visible"):
            entry[name] = np.array(entry[name], dtype=np.float64)
        entry["present"] = np.array(entry["present"])
    return {os.path.join(folder, path): entry for path, entry in entries.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vjepa_fast.data.physics", description="Labelled clips of physics.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    for name, default in (("train", 400), ("val", 200), ("surprise", 100)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"videos (default {default})")
    for name, default in (("seed", 0), ("size", 96), ("frames", 36), ("fps", 12)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    args = parser.parse_args()
    try:
        made = make_physics(
            args.out,
            args.train,
            args.val,
            args.surprise,
            args.seed,
            size=args.size,
            num_frames=args.frames,
            fps=args.fps,
        )
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{made.train_csv}  {made.val_csv}  {made.surprise_csv}")
