"""Names in `data.datasets` for generated sets of clips, made on first use in the cache folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vjepa_fast.data.generated.physics import make_physics
from vjepa_fast.data.generated.synthetic import make_synthetic

SYNTHETIC = "synthetic:"
PHYSICS = "physics:"

SYNTHETIC_SIZE = (400, 200)
"""Training and held-out videos that `synthetic:` stands for."""


def _synthetic(folder: Path) -> Path:
    return make_synthetic(folder, *SYNTHETIC_SIZE).train_csv


def _physics(folder: Path) -> Path:
    return make_physics(folder, 400, 200).train_csv


@dataclass(frozen=True)
class Generated:
    """A set of clips.

    Attributes:
        folder: within the cache directory.
        num_train: videos of its first split, which is what its name stands for.
        make: writes the set into a folder unless it is there, and gives the manifest of the first split.
    """

    folder: str
    num_train: int
    make: Callable[[Path], Path]


GENERATED = {SYNTHETIC: Generated("demo", SYNTHETIC_SIZE[0], _synthetic), PHYSICS: Generated("physics", 400, _physics)}


def make_sets(
    names: Iterable[str], cache: Path, is_first: bool, wait: Callable[[], None], say: Callable[[str], object]
) -> dict[str, Path]:
    """Make the sets that some of these names stand for, on several processes at once.

    Args:
        names: of data.datasets; those that are no such name are passed over.
        cache: folder that the sets lie in.
        is_first: the one process that writes.
        wait: returns when all processes have called it.
        say: told where they lie.

    Returns:
        The manifest of each set, by its name.
    """
    wanted = {name: GENERATED[name] for name in dict.fromkeys(names) if name in GENERATED}
    for kind in wanted.values():
        say(f"{kind.folder} videos in {cache / kind.folder}")
        if is_first:
            kind.make(cache / kind.folder)
    if wanted:
        wait()
    return {name: kind.make(cache / kind.folder) for name, kind in wanted.items()}
