"""Discs that fly, fall and bounce: exact motion from one contact to the next, no time steps.

Places are fractions of width and height of the picture, x to the right and y down; time is in seconds. Between two
contacts a disc flies on a parabola, and contacts are roots of polynomials of at most second degree: with an edge of the
picture, with the side of an upright wall, with another disc (whose acceleration is the same). All contacts are elastic:
energy is kept by all of them, momentum by those of two discs.

Legend: N discs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_CONTACTS = 100_000
"""After which a simulation is wrong."""

_LATER = 1e-9
"""Seconds: a contact nearer than this is the one that has just been."""


@dataclass
class World:
    """Discs at a moment.

    Attributes:
        radius: float64 [N].
        place, velocity: float64 [N, 2].
        gravity: downwards, picture heights a second squared.
        solid: whether discs touch one another; else they pass before and behind one another.
        walls: left and right side of upright walls from the lower to the upper edge.
        ghosts: discs that no wall stops.
        contacts: times of the contacts that were, of each disc.
    """

    radius: np.ndarray
    place: np.ndarray
    velocity: np.ndarray
    gravity: float = 0.0
    solid: bool = True
    walls: Sequence[tuple[float, float]] = ()
    ghosts: frozenset[int] = frozenset()
    time: float = 0.0
    contacts: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contacts = self.contacts or [[] for _ in self.radius]

    @property
    def mass(self) -> np.ndarray:
        """[N], the areas."""
        return self.radius**2

    def energy(self) -> float:
        """Of motion and height, over all discs."""
        speed = 0.5 * (self.velocity**2).sum(1)
        return float((self.mass * (speed - self.gravity * self.place[:, 1])).sum())

    def advance(self, until: float) -> None:
        """Let the time pass, from contact to contact."""
        for _ in range(MAX_CONTACTS):
            wait, contact = self._next(until - self.time)
            self.place += self.velocity * wait
            self.place[:, 1] += 0.5 * self.gravity * wait**2
            self.velocity[:, 1] += self.gravity * wait
            self.time += wait
            if contact is None:
                self.time = until
                return
            self._touch(*contact)
        raise AssertionError("discs touch one another without end")

    def _next(self, limit: float) -> tuple[float, tuple[int, int] | None]:
        """Seconds to the next contact, and which: (disc, other disc), or (disc, -1 - axis) with a wall or an edge."""
        best: tuple[float, tuple[int, int] | None] = (max(0.0, limit), None)
        for i, r in enumerate(self.radius):
            x, y = self.place[i]
            u, v = self.velocity[i]
            bounds = [(r, -1), (1 - r, 1)]
            if i not in self.ghosts:
                bounds += [bound for left, right in self.walls for bound in ((left - r, 1), (right + r, -1))]
            for bound, side in bounds:
                # Only from outside, on the way in.
                if u * side > 0 and side * (bound - x) >= -_LATER:
                    best = min(best, (max(0.0, (bound - x) / u), (i, -1)), key=lambda found: found[0])
            for bound, side in ((r, -1), (1 - r, 1)):
                wait = _reach(y - bound, v, self.gravity, side)
                best = min(best, (wait, (i, -2)), key=lambda found: found[0])
            for j in range(i) if self.solid else ():
                wait = self._meet(i, j)
                best = min(best, (wait, (i, j)), key=lambda found: found[0])
        return best

    def _meet(self, i: int, j: int) -> float:
        apart, closing = self.place[i] - self.place[j], self.velocity[i] - self.velocity[j]
        a, b = float(closing @ closing), float(apart @ closing)
        c = float(apart @ apart) - (self.radius[i] + self.radius[j]) ** 2
        root = b * b - a * c
        if b >= 0 or root < 0:
            return math.inf
        return max(0.0, c / (-b + math.sqrt(root)))

    def _touch(self, i: int, other: int) -> None:
        self.contacts[i].append(self.time)
        if other < 0:
            self.velocity[i, -1 - other] *= -1
            return
        self.contacts[other].append(self.time)
        apart = self.place[i] - self.place[other]
        closing = float((self.velocity[i] - self.velocity[other]) @ apart)
        mass = self.mass
        impulse = 2 * closing / (float(apart @ apart) * (mass[i] + mass[other])) * apart
        self.velocity[i] -= mass[other] * impulse
        self.velocity[other] += mass[i] * impulse


def _reach(height: float, speed: float, gravity: float, side: int) -> float:
    """Seconds until height + speed t + gravity t^2 / 2 is 0 on the way to a side (-1 above, 1 below); inf: never."""
    if gravity == 0:
        return max(0.0, -height / speed) if speed * side > 0 else math.inf
    root = speed**2 - 2 * gravity * height
    if root < 0:
        return math.inf
    # The later root is on the way down, the earlier one on the way up.
    wait = (-speed + side * math.sqrt(root)) / gravity
    return wait if wait > _LATER else (0.0 if wait > -_LATER and speed * side > 0 else math.inf)
