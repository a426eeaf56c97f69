"""The entries of `data.datasets`, opened: lists of files (vjepa_fast.data.video_lists) or packs (vjepa_fast.data.pack).

Which kinds of entry there are is vjepa_fast.data.frame_sources' matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.request import Source
from vjepa_fast.data.frame_sources import FrameSource, open_entry


@dataclass(frozen=True)
class Dataset:
    """One entry of `data.datasets`.

    Attributes:
        name: the entry as it was written.
        source: its videos or images.
        fpc: frames per clip.
        weight: its share of the clips, relative to the other datasets; None where no weights are configured.
    """

    name: str
    source: FrameSource
    fpc: int
    weight: float | None

    @property
    def paths(self) -> Sequence[str]:
        """Where the videos come from."""
        return self.source.paths

    @property
    def labels(self) -> list[Any]:
        """One a video."""
        return self.source.labels

    def num_phases(self, video: int) -> int:
        """In how many sequences the frames of a video are dealt out in turn; 0 or 1: they are one sequence."""
        return self.source.num_phases(video)

    def open(self, video: int, phase: int = 0) -> Source:
        """One sequence of a video, with its size and length.

        Raises:
            DecodeError: it cannot be used.
        """
        return self.source.open(video, phase)


def load_datasets(cfg: DataConfig) -> list[Dataset]:
    """Opens every entry of `cfg.datasets`.

    Raises:
        ConfigError: no dataset is configured, or one cannot show clips at the configured rate.
        UserError: an entry is missing, empty or unreadable; the message names it and says what was expected.
    """
    if not cfg.datasets:
        raise ConfigError("data.datasets is empty; expected at least one CSV, .npy, folder or glob of videos, or pack")
    fpcs = cfg.dataset_fpcs * len(cfg.datasets) if len(cfg.dataset_fpcs) == 1 else cfg.dataset_fpcs
    weights: Sequence[float | None] = cfg.datasets_weights or [None] * len(cfg.datasets)
    datasets = []
    for name, fpc, weight in zip(cfg.datasets, fpcs, weights, strict=True):
        source = open_entry(name, cfg.cache_dir)
        source.check_fps(cfg.fps)
        datasets.append(Dataset(name, source, fpc, weight))
    return datasets


def read_manifest(name: str) -> tuple[Sequence[str], list[Any]]:
    """Paths, a read-only sequence, and labels of an entry of `data.datasets`.

    Raises:
        UserError: missing, empty or unreadable.
    """
    source = open_entry(name)
    return source.paths, source.labels
