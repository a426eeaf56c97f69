"""Manifests of numbers for `vjepa-fast probe` out of labelled clips of physics.

    python -m vjepa_fast.evaluation.physics_targets train.csv val.csv [--frames 8 --fps 6]

writes beside each manifest that has a <name>_labels.json (position and velocity of discs in every frame, and so on):

    <name>_position.csv   x and y of the main disc in the middle of the plain clip
    <name>_track.csv      x and y of the main disc in every frame of the clip
    <name>_velocity.csv   its mean velocity over the clip
    <name>_contact.csv    seconds from the end of the clip to its next contact, of videos with one within a second
    <name>_hidden.csv     its position at the end of the clip, of videos in which less than half of it is seen there

The clip is the one that probes see of a video without augmentation. Videos in which something impossible happens are
left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.data.physics import load_physics_labels
from vjepa_fast.errors import UserError
from vjepa_fast.evaluation.views import ClipRule, segment_frames
from vjepa_fast.inference_videos import list_videos
from vjepa_fast.train.files import write_text

HORIZON = 1.0
"""Seconds ahead in which a contact is asked for."""
_HIDDEN = 0.5

Numbers = list[float] | None
_MAIN = 0


def _position(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["position"][frames[len(frames) // 2], _MAIN].tolist()
    return found


def _track(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["position"][frames, _MAIN].flatten().tolist()
    return found


def _velocity(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["velocity"][frames[0]:frames[-1] + 1, _MAIN].mean(0).tolist()
    return found


def _contact(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    seconds = float(entry["contact_in"][frames[-1], _MAIN])
    return [seconds] if seconds <= HORIZON else None


def _hidden(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["position"][frames[-1], _MAIN].tolist()
    return found if entry["visible"][frames[-1], _MAIN] < _HIDDEN else None


TARGETS: dict[str, Callable[[dict[str, Any], np.ndarray], Numbers]] = {
    "position": _position, "track": _track, "velocity": _velocity, "contact": _contact, "hidden": _hidden}
"""Numbers of a video by its labels and the frames of the clip; None leaves it out."""


def write_targets(manifest: Path, rule: ClipRule) -> dict[str, tuple[Path, int]]:
    """Writes the manifests.

    Args:
        manifest: of the videos.
        rule: how a video becomes a clip.

    Returns:
        Path and number of videos of each; of contact and hidden only where there are at least two.

    Raises:
        UserError: there are no such labels beside it.
    """
    labels = load_physics_labels(manifest)
    videos, lines = list_videos([str(manifest)]), dict[str, list[str]]()
    for number, path in enumerate(videos.paths):
        entry = labels[os.path.abspath(path)]
        if entry["violation"] is not None:
            continue
        (frames,) = segment_frames(videos.open(number), rule, [0.5])
        for name, numbers_of in TARGETS.items():
            numbers = numbers_of(entry, frames)
            if numbers is not None:
                lines.setdefault(name, []).append(f"{path} {','.join(f'{value:.6f}' for value in numbers)}\n")
    found = {}
    for name, own in lines.items():
        if len(own) > 1:
            found[name] = manifest.with_name(f"{manifest.stem}_{name}.csv"), len(own)
            write_text(found[name][0], "".join(own))
    return found


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vjepa_fast.evaluation.physics_targets", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="of a clip (default 8)")
    parser.add_argument("--fps", type=float, default=6.0, metavar="F", help="frames a second of a clip (default 6)")
    given = parser.parse_args(args)
    try:
        for manifest in given.manifests:
            found = write_targets(manifest, ClipRule(given.frames, given.fps, None, (1, 1)))
            print(*(f"{path}: {count} videos" for path, count in found.values()), sep="\n")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
