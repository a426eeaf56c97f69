"""Several clips of one video: which, decoded how often, and the same as if each were decoded alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import sampling
from vjepa_fast.data.decode import jpeg, pyav
from vjepa_fast.data.decode.backend import HostPreparer
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.loader import Batch, build_loader
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.reader import Pack
from vjepa_fast.data.pack.writer import make_pack


@pytest.fixture
def config(video_folder: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        return DataConfig(
            **{
                "datasets": [str(video_folder / "list.csv")],
                "batch_size": 8,
                "dataset_fpcs": [4],
                "crop_size": 32,
                "fps": 12.0,
                "cache_dir": tmp_path,
                "num_workers": 0,
                "clips_per_video": 4,
                **changes,
            }
        )

    return make


@pytest.fixture
def images(tmp_path: Path) -> str:
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return str(tmp_path / "images")


def collect(cfg: DataConfig, num_steps: int, rank: int = 0, world_size: int = 1, start_step: int = 0) -> list[Batch]:
    with build_loader(cfg, rank, world_size, start_step=start_step, num_steps=num_steps) as loader:
        return list(loader)


def by_sample(batch: Batch) -> dict[int, Any]:
    return {
        int(i): clip
        for ids, clips in zip(batch.sample_ids, batch.clips, strict=True)
        for i, clip in zip(ids, clips, strict=True)
    }


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 10**9),
    st.booleans(),
    st.booleans(),
)
def test_an_epoch_shows_every_video_so_many_times_in_a_row(
    sizes: list[int], count: int, epoch: int, shuffle: bool, weighted: bool
) -> None:
    total = sum(sizes)
    samples = count * epoch * total + np.arange(count * total)
    weights = [1.0] * len(sizes) if weighted else None
    chosen = np.stack(sampling.choose_videos(samples, sizes, weights, 3, shuffle, count))
    # The videos are those that clips of their own would show.
    single = sampling.choose_videos(epoch * total + np.arange(total), sizes, weights, 3, shuffle)
    assert np.array_equal(chosen, np.repeat(np.stack(single), count, axis=1))
    if not weighted:
        assert set(Counter(map(tuple, chosen.T.tolist())).values()) == {count}


def test_clips_differ_and_each_is_what_it_would_be_alone(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = pyav.open_video
    monkeypatch.setattr(pyav, "open_video", lambda path: opened.append(path) or original(path))
    cfg = config(seed=3)
    batches = collect(cfg, 2)
    assert len(opened) == 4, "a video is decoded more than once"
    for batch in batches:
        (clips,), (labels,) = batch.clips, batch.labels
        assert len(set(labels)) == 2 and labels[:4] == [labels[0]] * 4
        assert not any(torch.equal(a, b) for i, a in enumerate(clips) for b in clips[i + 1 :])
    monkeypatch.setattr(
        HostPreparer, "prepare_together", lambda self, requests: [pyav.decode_clip(request) for request in requests]
    )
    for batch, alone in zip(batches, collect(cfg, 2), strict=True):
        assert torch.equal(batch.clips[0], alone.clips[0])


def test_world_size_restart_and_workers_change_nothing(
    config: Callable[..., DataConfig], images: str, video_folder: Path
) -> None:
    """At 4 processes with 2 clips each a video's 4 clips are made by two of them."""
    cfg = config(
        batch_size=None,
        global_batch_size=8,
        datasets=[str(video_folder / "list.csv"), images],
        datasets_weights=[2.0, 1.0],
        dataset_fpcs=[4, 2],
    )
    whole = collect(cfg, 3)
    for world_size, num_workers in ((2, 1), (4, 0)):
        parts = [
            collect(cfg.model_copy(update={"num_workers": num_workers}), 2, rank, world_size, start_step=1)
            for rank in range(world_size)
        ]
        for step in range(2):
            ours = {i: clip for part in parts for i, clip in by_sample(part[step]).items()}
            theirs = by_sample(whole[step + 1])
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


def test_two_phase_pack_decodes_a_frame_once(
    config: Callable[..., DataConfig], video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PackSettings(fps=6.0, short_side=32, two_phase=True)
    make_pack(*read_manifest(str(video_folder / "list.csv")), tmp_path / "pack", settings, num_workers=1)
    cfg = config(datasets=[str(tmp_path / "pack")], fps=6.0, crop_size=32)
    alone = collect(cfg.model_copy(), 2)
    decoded: list[bytes] = []
    read: list[tuple[int, int]] = []
    decode, read_pack = jpeg._decode, Pack.read
    monkeypatch.setattr(jpeg, "_decode", lambda file, *rest: decoded.append(file) or decode(file, *rest))
    monkeypatch.setattr(
        Pack,
        "read",
        lambda self, video, frames: (
            read.extend((video, frame) for frame in frames.tolist()) or read_pack(self, video, frames)
        ),
    )
    batches = collect(cfg, 2)
    assert len(decoded) == len(read) == len(set(read)) > 0 and {frame % 2 for _, frame in read} == {0, 1}
    monkeypatch.setattr(
        HostPreparer,
        "prepare_together",
        lambda self, requests: [jpeg.decode_jpeg_clip(request) for request in requests],
    )
    for batch, other, one in zip(batches, alone, collect(cfg, 2), strict=True):
        assert torch.equal(batch.clips[0], other.clips[0]) and torch.equal(batch.clips[0], one.clips[0])
    assert Pack(str(tmp_path / "pack")).num_phases(0) == 2


def test_broken_video_is_replaced_clip_by_clip(
    config: Callable[..., DataConfig], video_folder: Path, tmp_path: Path
) -> None:
    """By the videos that replace it for the same samples at another world size too, and listed once."""
    (tmp_path / "empty.mp4").touch()
    lines = [f"{video_folder}/{number}.mp4 {number}\n" for number in range(7)] + [f"{tmp_path}/empty.mp4 99\n"]
    (tmp_path / "list.csv").write_text("".join(lines))
    cfg = config(datasets=[str(tmp_path / "list.csv")], max_broken=0.5, batch_size=None, global_batch_size=32)
    with build_loader(cfg, num_steps=1) as loader:
        (batch,) = list(loader)
        assert [video.path for video in loader.broken()] == [f"{tmp_path}/empty.mp4"]
    at = [
        i
        for i, (_, video) in enumerate(zip(*sampling.choose_videos(np.arange(32), [8], None, 0, True, 4), strict=True))
        if video == 7
    ]
    assert len(at) == 4 and len({batch.labels[0][i] for i in at}) > 1 and 99 not in batch.labels[0]
    parts = [collect(cfg, 1, rank, 16)[0] for rank in range(16)]
    assert torch.equal(torch.cat([part.clips[0] for part in parts]), batch.clips[0])


def test_what_does_not_divide_is_refused(config: Callable[..., DataConfig]) -> None:
    with pytest.raises(ValidationError, match=r"clips_per_video 3\b.*\bbatch_size 8\b"):
        config(clips_per_video=3)
    with pytest.raises(ValidationError, match=r"clips_per_video.*global_batch_size 6\b"):
        config(batch_size=None, global_batch_size=6)


def test_parts_of_a_video(config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip i of n comes from the i-th of n parts of one length, and is drawn in it as in a video of that length."""
    requests: list[Any] = []
    together = HostPreparer.prepare_together
    monkeypatch.setattr(
        HostPreparer, "prepare_together", lambda self, some: requests.append(some) or together(self, some)
    )
    cfg = config(clips_per_video=2, split_videos=True, frame_step=1, fps=None)
    collect(cfg, 1)
    assert len(requests) == 4
    sample, starts = 0, set()
    for pair in requests:
        length = pair[0].source.num_frames // 2
        for part, request in enumerate(pair):
            expected = sampling.clip_frames(sample, 0, length, 4, 1, cfg.seed) + part * length
            assert np.array_equal(request.frame_numbers, expected)
            assert expected[0] >= part * length and expected[-1] < (part + 1) * length
            starts.add(expected[0] - part * length)
            sample += 1
    assert len(starts) > 2


def test_more_clips_than_frames(config: Callable[..., DataConfig]) -> None:
    source: Any = SimpleNamespace(is_image=False, num_frames=5, avg_fps=12.0, height=64, width=64)
    with (
        build_loader(config(clips_per_video=8, split_videos=True)) as loader,
        pytest.raises(DecodeError, match="it has 5 frames for 8 clips"),
    ):
        loader._reader.request(0, 0, 0, {0: source})


@pytest.mark.parametrize(("round_fps", "expected"), [(True, 3), (False, 2)])
def test_frame_rates_are_rounded_or_not(round_fps: bool, expected: int) -> None:
    """V-JEPA 2 takes 29.97 for 30; V-JEPA 1 does not."""
    assert sampling.clip_step(30000 / 1001, 10, duration=1.0, round_fps=round_fps) == expected
