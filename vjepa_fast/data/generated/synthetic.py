"""The demo's clips: real H.264 files with shapes that move, collide and pass behind one another.

Every video has one main object and a small one, both brighter than the still, textured background by an amount that
differs from object to object. What leaves the picture on one side comes back on the other. Labels of the
main object are written beside the videos: its centre and velocity in every frame, and its shape.

The wrap-around is there for the probes. Without collisions, where an object is in any one frame says nothing about its
velocity, so no weighted sum over the pixels of a clip can tell the velocity: it takes relations between frames.

Everything drawn is a pure function of (seed, split, number of the video), so generating again gives the same clips.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from vjepa_fast.common.errors import UserError
from vjepa_fast.common.rng import Stream, pack_tag, random_words, unit

SHAPES = ("disc", "square", "triangle", "cross")
_VERSION = 5
_MARKER = "complete.json"
_NUM_OBJECTS = 2
_TEXTURE_CELLS = 7
_MAIN_RADIUS = (0.15, 0.19)
_SMALL_RADIUS = (0.06, 0.08)
_SPEED = (0.008, 0.04)
_BACKGROUND = 0.2
_CONTRAST = (80, 180)
# An object over an edge is seen on the other side too.
_COPIES = np.array([(x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])


@dataclass(frozen=True)
class SyntheticSet:
    """Two manifests that `data.datasets` accepts."""

    train_csv: Path
    val_csv: Path


@dataclass(frozen=True)
class VideoLabels:
    """The main object of one video, frame by frame.

    Attributes:
        position: float64 [T, 2] in [0, 1), centre (x to the right, y down) as fractions of width and height.
        velocity: float64 [T, 2], fractions of width and height per frame.
        class_id: index into SHAPES.
    """

    position: np.ndarray
    velocity: np.ndarray
    class_id: int


class Uniforms:
    """The numbers of one video, taken one after another from its own random stream."""

    def __init__(self, seed: int, split: int, video: int, stream: Stream = Stream.SYNTHETIC) -> None:
        tags = np.array([pack_tag(stream, group=split, block=block) for block in range(128)])
        self._values = unit(random_words(seed, video, 0, tags)).reshape(-1)
        self._used = 0

    def take(self, *shape: int) -> np.ndarray:
        """float64 of a shape, uniform in [0, 1)."""
        count = math.prod(shape)
        assert self._used + count <= len(self._values)
        self._used += count
        return self._values[self._used - count : self._used].reshape(shape)

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * float(self.take(1)[0])


def make_synthetic(
    folder: Path, num_train: int, num_val: int, seed: int = 0, *, size: int = 96, num_frames: int = 36, fps: int = 12
) -> SyntheticSet:
    """Writes the videos, manifests and labels, unless the folder already holds exactly these.

    Every file is renamed into place when it is whole, and a marker is written last: an interrupted generation is done
    again, and two processes may generate the same folder at once.

    Args:
        folder: created if missing.
        num_train, num_val: videos per split.
        seed: of everything drawn.
        size: height and width, pixels, even.
        num_frames: per video.
        fps: frames per second.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    made = SyntheticSet(folder / "train.csv", folder / "val.csv")
    recipe = {
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "size": size,
        "num_frames": num_frames,
        "fps": fps,
    }
    if _read_marker(folder) == recipe:
        return made
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).unlink(missing_ok=True)
        for split, (manifest, count) in enumerate(((made.train_csv, num_train), (made.val_csv, num_val))):
            _make_split(manifest, split, count, seed, size, num_frames, fps)
        write_text(folder / _MARKER, json.dumps(recipe))
    except OSError as error:
        raise UserError(
            f"the synthetic clips cannot be written to {folder}: {error.strerror}; free some space or name another "
            "folder"
        ) from error
    return made


def load_labels(manifest: Path) -> dict[str, VideoLabels]:
    """Labels of a manifest that make_synthetic wrote, by the path that load_datasets gives a video.

    Raises:
        UserError: there are no labels beside the manifest.
    """
    file = _labels_of(Path(manifest))
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no labels at {file} ({error}); expected a manifest written by make_synthetic") from error
    folder = os.path.dirname(os.path.abspath(manifest))
    return {
        os.path.join(folder, path): VideoLabels(
            np.array(entry["position"]), np.array(entry["velocity"]), int(entry["class_id"])
        )
        for path, entry in entries.items()
    }


def _labels_of(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}_labels.json")


def _read_marker(folder: Path) -> Any:
    try:
        return json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return None


def write_text(path: Path, text: str) -> None:
    """Renamed into place when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _make_split(manifest: Path, split: int, count: int, seed: int, size: int, num_frames: int, fps: int) -> None:
    folder = manifest.with_suffix("")
    folder.mkdir(exist_ok=True)
    entries = {}
    for video in range(count):
        frames, labels = render(seed, split, video, size, num_frames)
        encode(folder / f"{video:05d}.mp4", frames, fps)
        entries[f"{folder.name}/{video:05d}.mp4"] = {
            "class_id": labels.class_id,
            "shape": SHAPES[labels.class_id],
            "position": labels.position.round(6).tolist(),
            "velocity": labels.velocity.round(6).tolist(),
        }
    write_text(_labels_of(manifest), json.dumps(entries))
    write_text(manifest, "".join(f"{path} {entry['class_id']}\n" for path, entry in entries.items()))


def render(seed: int, split: int, video: int, size: int, num_frames: int) -> tuple[np.ndarray, VideoLabels]:
    """Frames of one video, uint8 [num_frames, size, size, 3], and its labels."""
    draw = Uniforms(seed, split, video)
    class_id = int(draw.between(0, len(SHAPES)))
    radius = np.array([draw.between(*_MAIN_RADIUS), draw.between(*_SMALL_RADIUS)])
    position, velocity = _simulate(draw, radius, num_frames)
    frames = np.repeat(background(draw, size)[None], num_frames, axis=0)
    # Back to front; the main object is anywhere in the order.
    for number in np.argsort(draw.take(_NUM_OBJECTS)):
        shape = class_id if number == 0 else int(draw.between(0, len(SHAPES)))
        _paint(frames, draw, position[:, number], float(radius[number]), shape)
    labels = VideoLabels(position[:, 0].copy(), velocity[:, 0].copy(), class_id)
    return frames, labels


def _simulate(draw: Uniforms, radius: np.ndarray, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities, float64 [num_frames, objects, 2], of discs in the unit square with wrap-around."""
    candidates = draw.take(_NUM_OBJECTS, 8, 2)
    place = candidates[:, 0].copy()
    for number in range(1, _NUM_OBJECTS):
        gaps = np.linalg.norm(_apart(candidates[number][:, None], place[None, :number]), axis=-1).min(axis=1)
        place[number] = candidates[number][np.argmax(gaps)]
    angle = 2 * math.pi * draw.take(_NUM_OBJECTS)
    speed = _SPEED[0] + (_SPEED[1] - _SPEED[0]) * draw.take(_NUM_OBJECTS)
    motion = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    solid = draw.take(_NUM_OBJECTS, _NUM_OBJECTS) < 0.5
    mass = radius**2
    positions, velocities = [], []
    for _ in range(num_frames):
        positions.append(place.copy())
        velocities.append(motion.copy())
        place = (place + motion) % 1.0
        for a in range(_NUM_OBJECTS):
            for b in range(a + 1, _NUM_OBJECTS):
                if solid[a, b]:
                    _collide(place, motion, mass, radius, a, b)
    return np.stack(positions), np.stack(velocities)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The shortest way from b to a, which may lead over the edge."""
    return (a - b + 0.5) % 1.0 - 0.5


def _collide(place: np.ndarray, motion: np.ndarray, mass: np.ndarray, radius: np.ndarray, a: int, b: int) -> None:
    """Elastic collision of two discs that touch and approach each other."""
    apart = _apart(place[a], place[b])
    distance = float(np.linalg.norm(apart))
    closing = float((motion[a] - motion[b]) @ apart)
    if distance == 0 or distance > radius[a] + radius[b] or closing >= 0:
        return
    impulse = 2 * closing / (distance**2 * (mass[a] + mass[b])) * apart
    motion[a] -= mass[b] * impulse
    motion[b] += mass[a] * impulse


def background(draw: Uniforms, size: int) -> np.ndarray:
    """uint8 [size, size, 3], dark: smooth noise and a grating."""
    cells = draw.take(_TEXTURE_CELLS, _TEXTURE_CELLS, 3) - 0.5
    at = (np.arange(size) + 0.5) / size * (_TEXTURE_CELLS - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(_TEXTURE_CELLS)))
    smooth = np.tensordot(weights, weights @ cells, axes=(1, 0))
    y, x = np.mgrid[:size, :size] / size
    angle, frequency = math.pi * draw.between(0, 1), 2 * math.pi * draw.between(3, 8)
    grating = np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle)) + 2 * math.pi * draw.between(0, 1))
    return (255 * (_BACKGROUND + 0.1 * smooth + 0.02 * grating[..., None]) + 0.5).astype(np.uint8)


def _paint(frames: np.ndarray, draw: Uniforms, centre: np.ndarray, radius: float, shape: int) -> None:
    """Draws one object into uint8 [T, size, size, 3], antialiased, with stripes that move along with it."""
    size = frames.shape[1]
    colour = (255 * _BACKGROUND + draw.between(*_CONTRAST) + 20 * (2 * draw.take(3) - 1)).astype(np.float32)
    turn, stripes = draw.between(0, 2 * math.pi), math.pi * draw.between(1.5, 3)
    cos, sin = math.cos(turn), math.sin(turn)
    reach = radius * 1.5 + 1 / size
    for frame, place in zip(frames, centre, strict=True):
        for x, y in place + _COPIES:
            top, bottom = max(0, int((y - reach) * size)), min(size, int((y + reach) * size) + 2)
            left, right = max(0, int((x - reach) * size)), min(size, int((x + reach) * size) + 2)
            if top >= bottom or left >= right:
                continue
            down = (((np.arange(top, bottom) + 0.5) / size - y) / radius).astype(np.float32)[:, None]
            across = (((np.arange(left, right) + 0.5) / size - x) / radius).astype(np.float32)
            u, v = cos * across + sin * down, cos * down - sin * across
            cover = np.clip(0.5 - _distance(shape, u, v) * radius * size, 0, 1)[..., None]
            shade = 1 + 0.1 * np.sin(stripes * u)[..., None]
            patch = frame[top:bottom, left:right]
            patch[...] = patch + cover * ((colour * shade).clip(0, 254) - patch) + 0.5


def _distance(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the edge, negative inside, in radii; all shapes have about the area of the unit disc."""
    if SHAPES[shape] == "disc":
        return np.hypot(u, v) - 1
    if SHAPES[shape] == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.89
    if SHAPES[shape] == "triangle":
        return np.maximum(v, np.abs(u) * math.sqrt(0.75) - v * 0.5) - 0.72
    bar = 0.42
    return np.minimum(np.maximum(np.abs(u) - 1.15, np.abs(v) - bar), np.maximum(np.abs(v) - 1.15, np.abs(u) - bar))


def encode(path: Path, frames: np.ndarray, fps: int) -> None:
    """An H.264 file of uint8 [T, H, W, 3], renamed into place when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with av.open(str(temporary), "w", format="mp4") as container:
        # The same bytes on every processor: with AVX-512 x264 even differs from one run to the next.
        stream: Any = container.add_stream(
            "libx264",
            rate=fps,
            options={"preset": "veryfast", "crf": "20", "threads": "1", "g": "24", "x264-params": "cpu-independent=1"},
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(temporary, path)
