"""What a probe is, and which probes there are.

A probe is a class with `reads` and `fit`, in a file of its own, and one line in the table below. A probe of another
package is an entry point of the group `vjepa_fast.probes`, or is given to `register`. This file imports no probe:
`vjepa-fast probe --help` lists them, and torch takes seconds.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vjepa_fast.evaluation.attentive_probe import HeadSetting
    from vjepa_fast.evaluation.run_probes import FrozenFeatures

BASELINE = "baseline"
"""What the training labels alone are worth, in the results beside the probes."""
ENTRY_POINTS = "vjepa_fast.probes"


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained. Only attentive probes train; others read what concerns them.

    Attributes:
        heads: schedules of the attentive probes, one each.
        depth: blocks, the last of which is the cross-attention.
        num_heads: attention heads.
        epochs: passes over the training videos.
        batch_size: videos of a step.
        decay_all, clip_norm: of GridAdamW.
        augmented: augmented versions of each training video, of which epoch e sees number e % augmented; 0: the
            plain clips.
        seed: of weights, order and augmentations.
    """

    heads: Sequence[HeadSetting]
    depth: int
    num_heads: int
    epochs: int = 20
    batch_size: int = 64
    decay_all: bool = True
    clip_norm: float | None = None
    augmented: int = 0
    seed: int = 0


@dataclass
class ProbeResult:
    """What a probe scored.

    Attributes:
        title: its row in the table of scores.
        scores: from `metrics.scores_of`, on the validation set.
        outputs: [N, C] on the validation set: probabilities, or predicted numbers.
        details: what else results.json holds.
        write_files: writes what else there is to keep, such as weights, into a folder.
    """

    title: str
    scores: dict[str, Any]
    outputs: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    write_files: Callable[[Path], None] | None = None


class Probe(Protocol):
    """Reads labels out of frozen features.

    Attributes:
        reads: "means" (`train_means`, `val_means`: of plain clips) or "tokens" (`train_tokens`, `val_tokens`: all of
            them, which take a hundred times the disk).
    """

    reads: Literal["means", "tokens"]

    def fit(
        self,
        features: FrozenFeatures,
        settings: ProbeSettings,
        device: torch.device,
        report: Callable[[int, int, str], None],
    ) -> ProbeResult:
        """Fit on the training videos and measure on the validation videos.

        Args:
            features: of both splits, with their labels.
            settings: how it is trained.
            device: where it is trained.
            report: called with the finished epochs, from 0, their number, and a few words. A probe that takes seconds
                need not call it.
        """


@dataclass(frozen=True)
class _Entry:
    summary: str
    place: str | Callable[[], Probe]


BUILT_IN = {
    "attentive": _Entry("V-JEPA's own, on all tokens", "vjepa_fast.evaluation.attentive_probe:AttentiveProbe"),
    "linear": _Entry("ridge regression on mean features", "vjepa_fast.evaluation.linear_probe:LinearProbe"),
    "knn": _Entry("nearest neighbours of mean features", "vjepa_fast.evaluation.neighbours:NeighbourProbe"),
}
_registered: dict[str, _Entry] = {}


def register(name: str, summary: str, probe: str | Callable[[], Probe]) -> None:
    """Make a probe known to `--probe`.

    Args:
        name: for `--probe` and results.json.
        summary: what it does, in a few words.
        probe: its class, or `module:Class`, which is imported when the probe is used.

    Raises:
        ValueError: the name is taken, or has a comma or space in it.
    """
    if name in (BASELINE, *_known()):
        raise ValueError(f"there is a probe {name!r} already; expected a new name")
    if not _can_be_named(name):
        raise ValueError(f"the name of a probe is {name!r}; expected one without commas and spaces")
    _registered[name] = _Entry(summary, probe)


def names() -> list[str]:
    """Names of all probes: those of this package, then registered ones."""
    return list(_known())


def summary(name: str) -> str:
    """What a probe does, in a few words."""
    return _known()[name].summary


def create(name: str) -> Probe:
    """A probe, by its name.

    Raises:
        KeyError: there is none of this name.
    """
    place = _known()[name].place
    found: Probe = (pkgutil.resolve_name(place) if isinstance(place, str) else place)()
    return found


def _known() -> dict[str, _Entry]:
    return BUILT_IN | _registered | _installed()


@cache
def _installed() -> dict[str, _Entry]:
    """Entry points of other packages; none takes over a name of this one."""
    found = entry_points(group=ENTRY_POINTS)
    return {
        entry.name: _Entry(f"of {entry.value}", entry.value)
        for entry in found
        if entry.name not in (BASELINE, *BUILT_IN) and _can_be_named(entry.name)
    }


def _can_be_named(name: str) -> bool:
    """Whether `--probe`, a list separated by commas, can name it."""
    return bool(name) and not any(letter in ", \t\n" for letter in name)
