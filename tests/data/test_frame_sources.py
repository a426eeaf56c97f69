"""Every kind of entry of data.datasets is read in one way; a new kind is one class and one row."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vjepa_fast as vf
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import frame_sources
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.frame_sources import FrameSource, VideoFiles, open_entry
from vjepa_fast.data.manifest import load_datasets, read_manifest
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.reader import Pack
from vjepa_fast.data.pack.writer import make_pack
from vjepa_fast.evaluation.features import entries_of
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference.videos import Sampling, list_videos, read_clips


@dataclass(frozen=True)
class ZippedVideo:
    """One video of ZippedVideos, which is a folder of JPEG files in the zip."""

    path: str
    members: list[str]
    avg_fps: float = 8.0
    width: int = 32
    height: int = 32
    is_image: bool = False

    @property
    def num_frames(self) -> int:
        return len(self.members)

    def read_jpegs(self, frame_numbers: np.ndarray) -> list[bytes]:
        with zipfile.ZipFile(self.path.partition("#")[0]) as archive:
            return [archive.read(self.members[number]) for number in frame_numbers.tolist()]


class ZippedVideos:
    """A zip of JPEG files: a new kind of source, as somebody would write it."""

    def __init__(self, name: str, cache_dir: Path | None) -> None:
        self.name = name
        with zipfile.ZipFile(name) as archive:
            members = sorted(archive.namelist())
        folders = sorted({member.partition("/")[0] for member in members})
        self.members = [[one for one in members if one.startswith(f"{folder}/")] for folder in folders]
        self.paths = [f"{name}#{folder}" for folder in folders]
        self.labels: list[Any] = [int(folder) for folder in folders]

    @staticmethod
    def recognises(name: str) -> bool:
        return name.endswith(".zip")

    def check_fps(self, fps: float | None) -> None:
        if fps is not None and fps > 8:
            raise ConfigError(f"data.fps is {fps:g}, but {self.name} holds 8 frames a second")

    def num_phases(self, video: int) -> int:
        return 1

    def open(self, video: int, phase: int = 0) -> ZippedVideo:
        if len(self.members[video]) == 1:
            raise DecodeError("it has a single frame")
        return ZippedVideo(self.paths[video], self.members[video])

    def file_of(self, video: int) -> tuple[str, str]:
        return self.name, str(video)


@pytest.fixture
def zipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Six videos of one colour each, which is 40 times their number; the last one is broken."""
    name = tmp_path / "videos.zip"
    with zipfile.ZipFile(name, "w") as archive:
        for video in range(6):
            file = BytesIO()
            Image.new("RGB", (32, 32), (40 * video,) * 3).save(file, "JPEG")
            for frame in range(10 if video < 5 else 1):
                archive.writestr(f"{video}/{frame:03d}.jpg", file.getvalue())
    monkeypatch.setattr(frame_sources, "SOURCES", (ZippedVideos, *frame_sources.SOURCES))
    return str(name)


def config(name: str, **options: Any) -> DataConfig:
    return DataConfig(
        **{
            "datasets": [name],
            "dataset_fpcs": [4],
            "batch_size": 3,
            "fps": 4.0,
            "crop_size": 16,
            "patch_size": 16,
            "num_workers": 0,
            "max_broken": 1.0,
            **options,
        }
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_new_kind_trains(zipped: str, num_workers: int) -> None:
    with vf.build_loader(config(zipped, num_workers=num_workers), num_steps=8) as loader:
        batches = list(loader)
        assert [(one.path, one.reason) for one in loader.broken()] == [(f"{zipped}#5", "it has a single frame")]
    for batch in batches:
        assert batch.clips[0].shape == (3, 4, 16, 16, 3)
        # The label is the colour: it came with its video.
        assert torch.equal(batch.clips[0].float().mean((1, 2, 3, 4)), 40.0 * torch.tensor(batch.labels[0]))
    with pytest.raises(ConfigError, match=r"data\.fps is 16"):
        vf.build_loader(config(zipped, fps=16.0))


def test_new_kind_is_embedded(zipped: str) -> None:
    videos = list_videos([zipped])
    assert videos.labels == [0, 1, 2, 3, 4, 5] and read_manifest(zipped)[0] == videos.paths
    clips = read_clips(videos.open(3), Sampling(4, 4.0, (16, 16)))
    assert clips.shape == (1, 4, 16, 16, 3) and (clips == 120).all()
    some = videos.only([4, 1])
    assert some.names == [f"{zipped}#4", f"{zipped}#1"]
    assert (read_clips(some.open(1), Sampling(4, 4.0, (16, 16))) == 40).all()
    # Features that are kept are found again by file and place.
    rule = ClipRule(4, 4.0, None, (16, 16))
    keys = [entry.key for entry in entries_of(videos, [rule])[0]]
    assert len(set(keys)) == 6
    assert [entry.key for entry in entries_of(some, [rule])[0]] == [keys[4], keys[1]]


def test_first_kind_that_recognises_an_entry_reads_it(
    video_folder: Path, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    paths = [str(write_video(tmp_path / f"{number}.mp4", num_frames=12)) for number in range(2)]
    make_pack(paths, [3, 4], tmp_path / "pack", PackSettings(short_side=32), num_workers=1)
    kinds: Sequence[tuple[str, type[FrameSource]]] = [(str(tmp_path / "pack"), Pack), (paths[0], VideoFiles)]
    for name, kind in kinds:
        source = open_entry(name, tmp_path / "cache")
        assert type(source) is kind
        again = pickle.loads(pickle.dumps(source))
        assert list(again.paths) == list(source.paths) and again.labels == source.labels
        assert again.open(0).num_frames == source.open(0).num_frames > 0
    # A worker opens a pack again; its paths and labels are not sent.
    (dataset,) = load_datasets(config(str(tmp_path / "pack")))
    assert len(pickle.dumps(dataset)) < 1000 and dataset.labels == [3, 4]
