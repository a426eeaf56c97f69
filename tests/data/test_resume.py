"""A run that goes on with 1, then 2, then 4 processes and other workers has the clips of one that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import frame_sources
from vjepa_fast.data import loader as loader_module
from vjepa_fast.data.decode.backend import HostFinisher
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.request import ClipRequest
from vjepa_fast.data.loader import build_loader

GLOBAL_BATCH = 8
Clips = dict[int, tuple[int, Any, Tensor]]
"""Frames-per-clip group, label and clip by global sample number."""


def part_of_run(cfg: DataConfig, world_size: int, state: dict[str, int], end: int) -> tuple[Clips, dict[str, int]]:
    """The clips of all processes from a saved position on, and the position saved at the end."""
    clips: Clips = {}
    for rank in range(world_size):
        loader = build_loader(cfg, rank, world_size, num_steps=end)
        loader.load_state_dict(state)
        with loader:
            for batch in loader:
                own = torch.cat(batch.sample_ids).tolist()
                first = (batch.step * world_size + rank) * len(own)
                assert sorted(own) == list(range(first, first + len(own)))
                for group, ids, labels, pixels in zip(
                    batch.group_ids, batch.sample_ids, batch.labels, batch.clips, strict=True
                ):
                    clips |= {
                        i: (group, label, clip) for i, label, clip in zip(ids.tolist(), labels, pixels, strict=True)
                    }
            saved = loader.state_dict()
    return clips, saved


def assert_goes_on(cfg: DataConfig, parts: list[tuple[int, int, int]]) -> None:
    """Parts: number of processes, decoding processes of each, step at which it ends."""
    end = parts[-1][2]
    whole, _ = part_of_run(cfg.model_copy(update={"num_workers": 0}), 1, {"step": 0}, end)
    pieces: Clips = {}
    state = {"step": 0}
    for world_size, num_workers, stop in parts:
        piece, state = part_of_run(cfg.model_copy(update={"num_workers": num_workers}), world_size, state, stop)
        assert not pieces.keys() & piece.keys()
        pieces |= piece
    assert sorted(pieces) == sorted(whole) == list(range(end * GLOBAL_BATCH))
    for number, (group, label, clip) in whole.items():
        other = pieces[number]
        assert (group, label) == other[:2] and torch.equal(clip, other[2]), number


@dataclass(frozen=True)
class Source:
    """A video that is nowhere: its length comes from its name."""

    path: str
    is_image: bool = False
    avg_fps: float = 24.0
    width: int = 320
    height: int = 240

    @property
    def num_frames(self) -> int:
        return 20 + sum(self.path.encode()) % 97


class Preparer:
    """Clips that say what was asked for, [T, 7]; every fifth video is broken."""

    def prepare(self, request: ClipRequest) -> Tensor:
        number = int(Path(request.source.path).stem)
        if number % 5 == 3:
            raise DecodeError("broken")
        rest = [number, *request.box, int(request.flip)]
        return torch.tensor([[frame, *rest] for frame in request.frame_numbers.tolist()])

    def prepare_together(self, requests: list[ClipRequest]) -> list[Tensor]:
        return [self.prepare(request) for request in requests]

    def collate(self, prepared: list[Tensor]) -> Tensor:
        return torch.stack(prepared)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("manifests")
    for name, count in (("a", 23), ("b", 6)):
        (folder / f"{name}.csv").write_text("".join(f"/{name}/{number}.mp4 {number}\n" for number in range(count)))
    return [str(folder / "a.csv"), str(folder / "b.csv")]


@settings(max_examples=25)
@given(
    weights=st.sampled_from([None, [1.0, 2.0], [0.0, 1.0]]),
    fpcs=st.sampled_from([[4, 4], [4, 2]]),
    shuffle=st.booleans(),
    clips_per_video=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**63 - 1),
    lengths=st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(1, 6)),
    worlds=st.permutations([1, 2, 4]),
)
def test_any_step_and_any_order_of_world_sizes(
    manifests: list[str],
    weights: list[float] | None,
    fpcs: list[int],
    shuffle: bool,
    clips_per_video: int,
    seed: int,
    lengths: tuple[int, int, int],
    worlds: list[int],
) -> None:
    cfg = DataConfig(
        datasets=manifests,
        datasets_weights=weights,
        dataset_fpcs=fpcs,
        global_batch_size=GLOBAL_BATCH,
        fps=8.0,
        crop_size=32,
        patch_size=16,
        shuffle=shuffle,
        clips_per_video=clips_per_video,
        seed=seed,
        max_broken=1.0,
    )
    ends = [sum(lengths[:count]) for count in (1, 2, 3)]
    finisher = HostFinisher(torch.device("cpu"), False, 1)
    with (
        mock.patch.object(loader_module, "make_backend", lambda *_: (Preparer(), finisher)),
        mock.patch.object(frame_sources, "open_source", lambda path, _: Source(path)),
    ):
        assert_goes_on(cfg, [(world, 0, end) for world, end in zip(worlds, ends, strict=True)])


@pytest.mark.parametrize("parts", [[(1, 0, 3), (2, 1, 4), (4, 2, 6)], [(1, 2, 1), (2, 0, 3), (4, 1, 5)]])
def test_pixels(
    video_folder: Path, tmp_path: Path, parts: list[tuple[int, int, int]], write_video: Callable[..., Path]
) -> None:
    names = [video_folder / f"{number}.mp4" for number in range(8)]
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "a.csv").write_text("".join(f"{name} {i}\n" for i, name in enumerate([*names, tmp_path / "empty.mp4"])))
    write_video(tmp_path / "0.mkv", num_frames=30)
    (tmp_path / "b.csv").write_text(f"{tmp_path}/0.mkv 20\n{names[0]} 21\n")
    cfg = DataConfig(
        datasets=[str(tmp_path / "a.csv"), str(tmp_path / "b.csv")],
        datasets_weights=[3.0, 1.0],
        dataset_fpcs=[4, 2],
        global_batch_size=GLOBAL_BATCH,
        fps=8.0,
        crop_size=32,
        cache_dir=tmp_path,
        max_broken=1.0,
    )
    assert_goes_on(cfg, parts)
