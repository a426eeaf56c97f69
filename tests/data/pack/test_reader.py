"""Training from packs: the frames, crops and flips that sampling asks for; mixtures; shards that are gone or cut."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny import tiny_config
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import sampling
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.jpeg import decode_jpeg_clip, decode_jpegs
from vjepa_fast.data.decode.pyav import resize_clip
from vjepa_fast.data.decode.request import ClipRequest, JpegSource
from vjepa_fast.data.loader import Batch, build_loader
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.pack import encode
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.reader import Pack
from vjepa_fast.data.pack.writer import make_pack
from vjepa_fast.train.trainer import Trainer

SETTINGS = PackSettings(fps=8.0, short_side=32, two_phase=True, shard_bytes=50_000)


@pytest.fixture(scope="module")
def folder(video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-phase pack of the eight videos and an image, at 8 frames/s."""
    out = tmp_path_factory.mktemp("packs")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(out / "still.png")
    paths, labels = read_manifest(str(video_folder / "list.csv"))
    make_pack([*paths, str(out / "still.png")], [*labels, "still"], out / "pack", SETTINGS, num_workers=1)
    return out / "pack"


def config(*datasets: Any, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"batch_size": 4, "dataset_fpcs": [4], "crop_size": 32, "fps": 8.0, "num_workers": 0}
    return DataConfig(datasets=[str(name) for name in datasets], **{**values, **changes})


def batches(cfg: DataConfig, num_steps: int, **options: Any) -> list[Batch]:
    with build_loader(cfg, num_steps=num_steps, **options) as loader:
        return list(loader)


def stored(pack: Pack, video: int) -> np.ndarray:
    """All frames of a video as Pillow opens them, uint8 [N, H, W, 3]."""
    count = int(np.diff(pack.index.video_first)[video])
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in pack.read(video, np.arange(count))])


def test_clips_are_what_sampling_asks_for(folder: Path) -> None:
    pack = Pack(str(folder))
    cfg = config(folder, batch_size=9)
    (batch,), phases = batches(cfg, 1), set()
    _, videos = sampling.choose_videos(np.arange(9), [9], None, cfg.seed)
    assert sorted(videos) == list(range(9)) and batch.labels[0] == [pack.labels[video] for video in videos]
    for sample, video in enumerate(videos.tolist()):
        frames = stored(pack, video)
        phase = sampling.choose_phase(sample, 0, 2, cfg.seed) if video != 8 else 0
        numbers = np.zeros(4, dtype=np.int64)
        if video != 8:
            phases.add(phase)
            numbers = phase + 2 * sampling.clip_frames(sample, 0, len(frames[phase::2]), 4, 1, cfg.seed)
            # Neighbours, half the rate that is stored.
            assert np.diff(numbers).tolist() == [2, 2, 2]
        box = sampling.crop_box(sample, 0, 32, 32, (0.3, 1.0), (0.75, 1.35), cfg.seed)
        crop = frames[numbers, box.top : box.top + box.height, box.left : box.left + box.width]
        expected = resize_clip(crop, (32, 32), sampling.is_flipped(sample, 0, cfg.seed))
        assert torch.equal(batch.clips[0][sample], expected)
    assert phases == {0, 1}


def test_workers_processes_and_spawn(folder: Path) -> None:
    alone = batches(config(folder), 4)
    for left, right in zip(alone, batches(config(folder, num_workers=2), 4), strict=True):
        assert torch.equal(left.clips[0], right.clips[0])
    halves = [batches(config(folder, batch_size=2), 4, rank=rank, world_size=2) for rank in range(2)]
    for left, first, second in zip(alone, *halves, strict=True):
        assert torch.equal(left.clips[0], torch.cat([first.clips[0], second.clips[0]]))
    copy = pickle.loads(pickle.dumps(Pack(str(folder))))
    assert copy.read(0, np.arange(3)) == Pack(str(folder)).read(0, np.arange(3))


def test_mixture_of_pack_and_videos(folder: Path, video_folder: Path, tmp_path: Path) -> None:
    cfg = config(
        folder,
        video_folder / "list.csv",
        datasets_weights=[0.5, 0.5],
        dataset_fpcs=[2, 4],
        cache_dir=tmp_path,
        batch_size=8,
    )
    seen = {
        (group, len(labels))
        for batch in batches(cfg, 6)
        for group, labels in zip(batch.group_ids, batch.labels, strict=True)
    }
    assert {group for group, _ in seen} == {0, 1}


def test_training_on_a_mixture(folder: Path, video_folder: Path, tmp_path: Path) -> None:
    names = json.dumps([str(folder), str(video_folder / "list.csv")])
    losses = []
    for run in range(2):
        (tmp_path / str(run)).mkdir()
        cfg = tiny_config(
            folder,
            tmp_path / "cache",
            f"data.datasets={names}",
            "data.datasets_weights=[0.5, 0.5]",
            "train.max_steps=4",
        )
        Trainer(cfg, folder=tmp_path / str(run)).fit()
        with (tmp_path / str(run) / "log_r0.csv").open(newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1] and len(losses[0]) == 4 and np.isfinite(losses[0]).all()


def test_any_frames_in_any_order(folder: Path) -> None:
    source = Pack(str(folder)).open(3, phase=1)
    assert isinstance(source, JpegSource) and source.num_frames == 8 and source.avg_fps == 8.0
    frames = stored(source.pack, 3)[1::2]
    numbers = np.array([5, 0, 0, 7, 2])
    request = ClipRequest(source, numbers, sampling.Box(4, 2, 20, 24), (20, 24), True)
    assert torch.equal(decode_jpeg_clip(request), torch.from_numpy(frames[numbers, 4:24, 2:26]).flip(2))


def test_short_videos(folder: Path) -> None:
    # 7 to 9 frames a phase: the last one is repeated.
    (batch,) = batches(config(folder, dataset_fpcs=[16], batch_size=8), 1)
    assert batch.clips[0].shape == (8, 16, 32, 32, 3)
    assert all(torch.equal(clip[-1], clip[-2]) for clip in batch.clips[0])
    # An image is never too short.
    for batch in batches(config(folder, dataset_fpcs=[16], filter_short_videos=True), 3):
        assert batch.labels == [["still"] * 4]


@pytest.mark.parametrize("phases", [None, 2])
def test_two_phases_of_a_video_with_one_frame(
    write_video: Callable[..., Path], tmp_path: Path, phases: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if phases:
        # As earlier packs have it.
        monkeypatch.setattr(encode, "packed_frames", lambda *_: (np.zeros(1, dtype=np.int64), 4.0, phases))
    path = write_video(tmp_path / "a.mp4", num_frames=3)
    make_pack([str(path)], [0], tmp_path / "pack", PackSettings(two_phase=True), num_workers=1)
    assert len(Pack(str(tmp_path / "pack")).index.frame_bytes) == 1
    for batch in batches(config(tmp_path / "pack", fps=4.0), 4):
        assert (batch.clips[0] == batch.clips[0][:, :1]).all()


@pytest.mark.parametrize(
    ("own", "fps", "clips"),
    [(4.1, 4.1, 4.1), (4.1, 1.0, 0.82), (29.97, 9.99, 9.99), (29.97, 4.0, 29.97 / 7), (0.5, 0.5, 0.25)],
)
def test_rates_are_those_of_the_clips(folder: Path, own: float, fps: float, clips: float) -> None:
    assert own / sampling.clip_step(own, 4, fps=fps) == pytest.approx(clips)
    pack = Pack(str(folder))
    pack.index = dataclasses.replace(pack.index, settings=dataclasses.replace(SETTINGS, fps=own))
    if abs(clips / fps - 1) < 0.1:
        pack.check_fps(fps)
        return
    with pytest.raises(ConfigError, match=f"holds {own:g} frames a second, and clips would show {clips:g};"):
        pack.check_fps(fps)


def test_rates_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for fps in (16.0, 6.0):
        with pytest.raises(
            ConfigError,
            match=rf"data.fps is {fps:g}, but pack .* holds 8 frames a second, and "
            rf"clips would show 8; expected data.fps=8 .* --fps {fps:g}, or",
        ):
            build_loader(config(folder, fps=fps))
    build_loader(config(folder, fps=4.0))
    build_loader(config(folder, fps=None, duration=1.0))
    (tmp_path / ".unfinished").mkdir()
    with pytest.raises(UserError, match=r"is unfinished; run the `vjepa-fast pack` command"):
        build_loader(config(tmp_path))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def reason(folder: Path, video: int) -> str:
    with pytest.raises(DecodeError) as caught:
        Pack(str(folder)).read(video, np.arange(3))
    return str(caught.value)


def test_damaged_shards(copy: Path) -> None:
    pack = Pack(str(copy))
    shard = copy / "shard-000000.tar"
    assert pack.index.video_shard[0] == 0
    start, size = int(pack.index.frame_offset[1]), int(pack.index.frame_bytes[1])
    data = bytearray(shard.read_bytes())
    data[start + size // 2] ^= 1
    shard.write_bytes(data)
    assert reason(copy, 0) == (
        f"shard-000000.tar of pack {copy} is damaged at byte {start}: what lies there is not the frame that was packed"
    )
    for length in (start + 100, 0):
        os.truncate(shard, length)
        where = start + size if length else pack.index.frame_offset[0] + pack.index.frame_bytes[0]
        assert reason(copy, 0) == (
            f"shard-000000.tar of pack {copy} is truncated: it ends before byte {where} of {len(data)}"
        )
    shard.unlink()
    assert reason(copy, 0) == f"shard-000000.tar of pack {copy} is missing"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_of_a_lost_shard_are_replaced(copy: Path, num_workers: int) -> None:
    (copy / "shard-000000.tar").unlink()
    lost = int((Pack(str(copy)).index.video_shard == 0).sum())
    assert 0 < lost < 9
    with build_loader(config(copy, num_workers=num_workers, max_broken=0.9), num_steps=6) as loader:
        assert sum(len(batch.clips[0]) for batch in loader) == 24
        broken = loader.broken()
    assert len(broken) == lost and all("shard-000000.tar" in video.reason for video in broken)
    assert broken[0].path.endswith(".mp4")


def test_damaged_jpeg() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16)).save(buffer, "JPEG")
    data = buffer.getvalue()
    assert decode_jpegs([data], 16, 32).shape == (1, 16, 32, 3)
    for bad in (data[:40], b"", bytes(300), data):
        with pytest.raises(DecodeError, match="one of its JPEG files is damaged"):
            decode_jpegs([bad], 16 if bad is not data else 8, 32)


def test_checksum_is_of_the_file(folder: Path) -> None:
    pack = Pack(str(folder))
    assert [zlib.crc32(data) for data in pack.read(8, np.arange(1))] == pack.index.frame_crc[-1:].tolist()
