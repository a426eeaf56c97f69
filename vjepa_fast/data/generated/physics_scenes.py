"""One video of simple physics: what happens in it, and its frames. physics.py says what the scenes are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vjepa_fast.common.rng import Stream
from vjepa_fast.data.generated.physics_world import World
from vjepa_fast.data.generated.synthetic import Uniforms, background

KINDS = ("bounce", "collision", "occlusion", "gravity")
VIOLATIONS = {
    "bounce": ("through", "vanish", "jump"),
    "collision": ("vanish", "jump"),
    "occlusion": ("vanish", "jump"),
    "gravity": ("vanish", "jump"),
}
"""What can go wrong in a scene."""

HORIZON = 10.0
"""Seconds after the end of a clip in which a next contact is looked for."""

_RADIUS = ((0.13, 0.17), (0.07, 0.1))
_SPEED = (0.2, 0.5)
_GRAVITY = (0.4, 0.9)
_COLOURS = np.array([[205.0, 90, 75], [80, 115, 205]])
"""Of the main disc, reddish, and the other, bluish: the middle of what is drawn."""
_SHADES = 40.0
"""Half the range around it."""
_GREY = 70.0, 90.0
"""Of wall and screen: hardly brighter than the background. Large bright surfaces that never move are all that a small
model learns in hundreds of steps (docs/small_scale.md)."""
_STRIPES = 0.2
"""By how much the stripes of a disc are brighter and darker than it."""
_JUMP = 0.25


@dataclass
class Scene:
    """One video before it is drawn. Legend: T frames, N discs."""

    kind: str
    radius: np.ndarray
    front: np.ndarray
    """int64 [N]: the discs from back to front."""
    boxes: dict[str, tuple[float, float, float, float]]
    """`wall` or `screen`: left, top, right, bottom; in front of the discs."""
    position: np.ndarray
    """float64 [T, N, 2], centres."""
    velocity: np.ndarray
    """float64 [T, N, 2], a second."""
    contact_in: np.ndarray
    """float64 [T, N], seconds; nan for none."""
    present: np.ndarray
    """bool [T, N]: drawn at all."""
    violation: tuple[str, int] | None


def simulate(seed: int, split: int, video: int, num_frames: int, fps: int, impossible: bool = False) -> Scene:
    """A scene and its motion; with `impossible` the same one until something happens that cannot."""
    draw = Uniforms(seed, split, video, Stream.PHYSICS)
    kind = KINDS[video % len(KINDS)]
    radius = np.array([draw.between(*bounds) for bounds in _RADIUS])
    gravity = draw.between(*_GRAVITY)
    world = World(
        radius,
        np.zeros((2, 2)),
        np.zeros((2, 2)),
        gravity if kind == "gravity" else 0.0,
        solid=kind in ("collision", "gravity"),
    )
    boxes: dict[str, tuple[float, float, float, float]] = {}
    middle, half = draw.between(0.44, 0.56), draw.between(0.14, 0.18)
    free = [(r, 1 - r) for r in radius]
    if kind == "bounce":
        boxes["wall"] = middle - 0.02, 0.0, middle + 0.02, 1.0
        world.walls = [(middle - 0.02, middle + 0.02)]
        side = draw.between(0, 1) < 0.5
        for i, r in enumerate(radius):
            free[i] = (r, middle - 0.02 - r) if side == (i == 0) else (middle + 0.02 + r, 1 - r)
    elif kind == "occlusion":
        boxes["screen"] = middle - half, draw.between(0.0, 0.1), middle + half, 1.0
    _place(draw, world, kind, free)
    front = np.argsort(draw.take(2))
    wanted, moment = draw.between(0, 1), draw.between(0.35, 0.65)
    jump = draw.between(0, 2 * math.pi)
    violation = None
    if impossible:
        options = VIOLATIONS[kind]
        violation = options[int(wanted * len(options))], round(moment * num_frames)
    return _move(Scene(kind, radius, front, boxes, *(np.zeros(0),) * 4, violation), world, num_frames, fps, jump)


def _place(draw: Uniforms, world: World, kind: str, free: list[tuple[float, float]]) -> None:
    """Where the discs begin, apart from one another, and how fast."""
    candidates = draw.take(8, 2, 2)
    for i, r in enumerate(world.radius):
        low, high = free[i]
        spots = np.stack([low + (high - low) * candidates[:, i, 0], r + (1 - 2 * r) * candidates[:, i, 1]], 1)
        far = 0 if i == 0 else int(np.argmax(np.linalg.norm(spots - world.place[0], axis=1)))
        world.place[i] = spots[far]
        if kind == "occlusion" and i == 1:
            # At about the height of the main disc, so that one passes before the other.
            world.place[1, 1] = min(max(world.place[0, 1] + 0.2 * (candidates[far, 1, 1] - 0.5), r), 1 - r)
        speed, angle = draw.between(*_SPEED), draw.between(0, 2 * math.pi)
        if kind == "occlusion":
            # Sideways, so that it comes by the screen.
            angle = 0.3 * math.sin(angle) + (math.pi if math.cos(angle) < 0 else 0.0)
        world.velocity[i] = speed * math.cos(angle), speed * math.sin(angle)
    if kind == "collision":
        way = world.place[1] - world.place[0]
        world.velocity[0] = way / np.linalg.norm(way) * np.linalg.norm(world.velocity[0])


def _move(scene: Scene, world: World, num_frames: int, fps: int, jump: float) -> Scene:
    kind, at = scene.violation or ("", num_frames)
    positions, velocities, present, times = [], [], [], []
    for frame in range(num_frames):
        world.advance(frame / fps)
        if frame == at and kind == "jump":
            r = world.radius[0]
            # Along a circle around where it is, to the first spot that is free.
            for turn in np.linspace(0, 2 * math.pi, 64):
                spot = world.place[0] + _JUMP * np.array([math.cos(jump + turn), math.sin(jump + turn)])
                inside = np.all((spot > r) & (spot < 1 - r)) and all(
                    spot[0] + r < left or spot[0] - r > right for left, right in world.walls
                )
                if inside and np.linalg.norm(spot - world.place[1]) > world.radius.sum():
                    world.place[0] = spot
                    break
        if frame == at and kind == "vanish":
            world.solid = False
        if frame >= at and kind == "through":
            world.ghosts = frozenset({0})
        positions.append(world.place.copy())
        velocities.append(world.velocity.copy())
        present.append([kind != "vanish" or frame < at, True])
        times.append(world.time)
    world.advance(times[-1] + HORIZON)
    scene.position, scene.velocity, scene.present = np.stack(positions), np.stack(velocities), np.array(present)
    scene.contact_in = np.full((num_frames, len(world.radius)), np.nan)
    for i, contacts in enumerate(world.contacts):
        for frame, time in enumerate(times):
            later = [contact for contact in contacts if contact > time]
            if later and scene.present[frame, i]:
                scene.contact_in[frame, i] = later[0] - time
    if kind == "through":
        scene.violation = _went_through(scene, at)
    return scene


def _went_through(scene: Scene, at: int) -> tuple[str, int] | None:
    """The first frame in which the main disc is in the wall; None if it never gets there."""
    left, _, right, _ = scene.boxes["wall"]
    gap = np.maximum(left - scene.position[:, 0, 0], scene.position[:, 0, 0] - right)
    inside = np.flatnonzero(gap < scene.radius[0] - 1e-6)
    return ("through", int(inside[0])) if len(inside) else None


def render(scene: Scene, seed: int, split: int, video: int, size: int) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Frames, what is seen of the discs, and by what they are hidden.

    Returns:
        uint8 [T, size, size, 3]; float64 [T, N], share of each disc's area that is seen; and for each frame and disc
        the number of a disc, `wall`, `screen` or None.
    """
    # Another stream of numbers than that of the motion: a number of the split that is none.
    draw = Uniforms(seed, split + 8, video, Stream.PHYSICS)
    ground = background(draw, size).astype(np.float64)
    paints = [_paint(draw, colour) for colour in _COLOURS]
    grey = draw.between(*_GREY)
    num_frames, num_discs = scene.present.shape
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    visible, hidden_by = np.zeros((num_frames, num_discs)), []
    x = (np.arange(size) + 0.5) / size
    boxes = {name: _box(x, *sides) for name, sides in scene.boxes.items()}
    for t in range(num_frames):
        covers = [
            np.clip(0.5 + size * (r - np.hypot(x[None] - px, x[:, None] - py)), 0, 1) * there
            for r, (px, py), there in zip(scene.radius, scene.position[t], scene.present[t], strict=True)
        ]
        picture = ground.copy()
        for i in scene.front:
            offset = (x - scene.position[t, i, 0])[None], (x - scene.position[t, i, 1])[:, None]
            picture += covers[i][..., None] * (paints[i](*offset) - picture)
        for cover in boxes.values():
            picture += cover[..., None] * (grey - picture)
        frames[t] = picture.clip(0, 255) + 0.5
        hidden_by.append([None] * num_discs)
        for rank, i in enumerate(scene.front):
            area = covers[i].sum()
            if area == 0:
                continue
            above: dict[Any, np.ndarray] = {int(j): covers[j] for j in scene.front[rank + 1 :]}
            above |= boxes
            left = covers[i].copy()
            for cover in above.values():
                left *= 1 - cover
            visible[t, i] = left.sum() / area
            if visible[t, i] < 0.5:
                shares = {name: float((covers[i] * cover).sum()) for name, cover in above.items()}
                hidden_by[-1][i] = max(shares, key=shares.__getitem__)
    return frames, visible, hidden_by


def _paint(draw: Uniforms, colour: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A colour near the given one with stripes: [H, W, 3] of places relative to the centre of what is painted."""
    shade = colour + _SHADES * (2 * draw.take(3) - 1)
    turn, frequency, phase = draw.between(0, math.pi), draw.between(30, 60), draw.between(0, 2 * math.pi)

    def at(across: np.ndarray, down: np.ndarray) -> np.ndarray:
        wave = np.sin(frequency * (math.cos(turn) * across + math.sin(turn) * down) + phase)
        return shade * (1 + _STRIPES * wave[..., None])

    return at


def _box(x: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Share of each pixel that lies in a box, [size, size]."""
    half = 0.5 / len(x)
    sides = [
        np.clip((np.minimum(high, x + half) - np.maximum(low, x - half)) / (2 * half), 0, 1)
        for low, high in ((top, bottom), (left, right))
    ]
    return sides[0][:, None] * sides[1][None]
