"""Writes manifests of numbers and classes for `vjepa-fast probe` from labelled physics clips.

    python -m vjepa_fast.evaluation.physics_targets train.csv val.csv [--frames 8 --fps 6]

writes beside each manifest that has a <name>_labels.json (position and velocity of discs in every frame, and so on):

    <name>_position.csv   x and y of the main disc in the middle of the plain clip
    <name>_track.csv      x and y of the main disc in every frame of the clip
    <name>_velocity.csv   its mean velocity over the clip
    <name>_contact.csv    seconds from the end of the clip to its next contact, of videos with one within a second
    <name>_hidden.csv     its position at the end of the clip, of videos in which less than half of it is seen there
    <name>_behind.csv     class 0 to 5: which disc is hidden at the end of the clip, and by what (BEHIND)
    <name>_front.csv      class 0 or 1: which disc is in front (FRONT), of videos in which the clip shows it

The clip is the one that probes see of a video without augmentation. Videos in which something impossible happens are
left out.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vjepa_fast.common.atomic import write_text
from vjepa_fast.common.errors import UserError
from vjepa_fast.data.generated.physics import load_physics_labels
from vjepa_fast.evaluation.views import ClipRule, segment_frames
from vjepa_fast.inference.videos import list_videos

HORIZON = 1.0
"""Seconds ahead in which a contact is asked for."""
_HIDDEN = 0.5

BEHIND = (
    "nothing hidden",
    "main behind other",
    "other behind main",
    "main behind screen",
    "other behind screen",
    "both hidden",
)
"""Classes of `behind`."""

FRONT = ("main in front", "other in front")
"""Classes of `front`."""

_OVERLAP = 0.02
"""How deep one disc reaches into the other where that counts as seen, in widths of the picture: a pixel of 48."""

Numbers = list[float] | None
_MAIN, _OTHER = 0, 1


class Written(NamedTuple):
    """A manifest: where, how many videos, and of how many each class is, by name; empty where labels are numbers."""

    path: Path
    videos: int
    classes: dict[str, int]


def behind(entry: dict[str, Any], frame: int) -> int:
    """Which disc is hidden in a frame, and behind what: a number of BEHIND.

    Hidden means that less than half of a disc is seen, as in the labels. A wall counts as a screen. Both hidden is a
    class of its own, by whatever they are hidden. The main disc is so much the larger one that the other can hardly
    hide half of it: class 1 is all but empty, and `front` asks what can be asked.

    Args:
        entry: of a video, from load_physics_labels.
        frame: of the video.
    """
    main, other = entry["hidden_by"][frame]
    if main is not None and other is not None:
        return 5
    if main is not None:
        return 1 if main == _OTHER else 3
    if other is not None:
        return 2 if other == _MAIN else 4
    return 0


def front(entry: dict[str, Any], frames: Iterable[int]) -> int | None:
    """Which disc is in front, a number of FRONT; None unless one of the frames shows it.

    It shows where the discs overlap by at least 0.02 of the picture's width and the middle of the overlap is not
    behind screen or wall; how much of either disc is seen does not matter. The order stays throughout a video.

    Args:
        entry: of a video, from load_physics_labels.
        frames: of the video, such as those of a clip, or its last one alone.
    """
    return int(entry["front"][-1]) if any(_overlap_seen(entry, frame) for frame in frames) else None


def _overlap_seen(entry: dict[str, Any], frame: int) -> bool:
    (place, to), (radius, radius_to) = entry["position"][frame], entry["radius"]
    distance = float(np.linalg.norm(to - place))
    # Along the line from centre to centre, the overlap goes from here to there.
    low, high = max(-radius, distance - radius_to), min(radius, distance + radius_to)
    if high - low < _OVERLAP or not entry["present"][frame].all():
        return False
    x, y = place + (to - place) / max(distance, 1e-9) * (low + high) / 2
    return not any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in entry["boxes"].values())


def _position(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["position"][frames[len(frames) // 2], _MAIN].tolist()
    return found


def _track(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["position"][frames, _MAIN].flatten().tolist()
    return found


def _velocity(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["velocity"][frames[0] : frames[-1] + 1, _MAIN].mean(0).tolist()
    return found


def _contact(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    seconds = float(entry["contact_in"][frames[-1], _MAIN])
    return [seconds] if seconds <= HORIZON else None


def _hidden(entry: dict[str, Any], frames: np.ndarray) -> Numbers:
    found: list[float] = entry["position"][frames[-1], _MAIN].tolist()
    return found if entry["visible"][frames[-1], _MAIN] < _HIDDEN else None


TARGETS: dict[str, Callable[[dict[str, Any], np.ndarray], Numbers]] = {
    "position": _position,
    "track": _track,
    "velocity": _velocity,
    "contact": _contact,
    "hidden": _hidden,
}
"""Numbers of a video by its labels and the frames of the clip; None leaves it out."""

CLASSES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], np.ndarray], int | None]]] = {
    "behind": (BEHIND, lambda entry, frames: behind(entry, frames[-1])),
    "front": (FRONT, front),
}
"""Names of classes, and the class of a video, as TARGETS."""


def write_targets(manifest: Path, rule: ClipRule) -> dict[str, Written]:
    """Writes the manifests.

    Args:
        manifest: of the videos.
        rule: how a video becomes a clip.

    Returns:
        What was written, by name; a manifest of fewer than two videos is not.

    Raises:
        UserError: there are no such labels beside it.
    """
    labels = load_physics_labels(manifest)
    videos, lines = list_videos([str(manifest)]), dict[str, list[str]]()
    counts = {name: Counter[str]() for name in CLASSES}
    for number, path in enumerate(videos.paths):
        entry = labels[os.path.abspath(path)]
        if entry["violation"] is not None:
            continue
        (frames,) = segment_frames(videos.open(number), rule, [0.5])
        for name, numbers_of in TARGETS.items():
            numbers = numbers_of(entry, frames)
            if numbers is not None:
                lines.setdefault(name, []).append(f"{path} {','.join(f'{value:.6f}' for value in numbers)}\n")
        for name, (names, class_of) in CLASSES.items():
            found = class_of(entry, frames)
            if found is not None:
                lines.setdefault(name, []).append(f"{path} {found}\n")
                counts[name][names[found]] += 1
    written = {}
    for name, own in lines.items():
        if len(own) > 1:
            written[name] = Written(manifest.with_name(f"{manifest.stem}_{name}.csv"), len(own), counts.get(name, {}))
            write_text(written[name].path, "".join(own))
    return written


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vjepa_fast.evaluation.physics_targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifests", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="of a clip (default 8)")
    parser.add_argument("--fps", type=float, default=6.0, metavar="F", help="frames a second of a clip (default 6)")
    given = parser.parse_args(args)
    try:
        for manifest in given.manifests:
            found = write_targets(manifest, ClipRule(given.frames, given.fps, None, (1, 1)))
            for path, count, classes in found.values():
                split = ", ".join(f"{classes[name]} {name}" for name in (*BEHIND, *FRONT) if name in classes)
                print(f"{path}: {count} videos" + (f" ({split})" if split else ""))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
