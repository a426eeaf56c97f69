"""The same batches at any number of workers and processes and after a restart; broken files; processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vjepa_fast
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import loader as loader_module
from vjepa_fast.data import sampling, workers
from vjepa_fast.data.clip_reader import ClipReader
from vjepa_fast.data.decode.backend import Finished, HostFinisher
from vjepa_fast.data.decode.convert import ToPixels
from vjepa_fast.data.decode.index import build_index
from vjepa_fast.data.decode.pyav import decode_each
from vjepa_fast.data.loader import Batch, Loader, build_loader

BASE: dict[str, Any] = {"batch_size": 4, "dataset_fpcs": [4], "crop_size": 32, "fps": 8.0, "num_workers": 0}


@pytest.fixture
def config(video_folder: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        values = {**BASE, "datasets": [str(video_folder / "list.csv")], "cache_dir": tmp_path / "cache", **changes}
        return DataConfig(**{key: value for key, value in values.items() if value is not None})

    return make


def collect(loader: Loader) -> list[Batch]:
    with loader:
        return list(loader)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [b.step for b in left] == [b.step for b in right]
    for a, b in zip(left, right, strict=True):
        assert a.group_ids == b.group_ids and a.labels == b.labels
        assert all(map(torch.equal, a.sample_ids, b.sample_ids)) and all(map(torch.equal, a.clips, b.clips))


def test_batches_are_as_described(config: Callable[..., DataConfig]) -> None:
    loader = build_loader(config(), num_steps=3)
    assert loader.fpcs == [4] and loader.num_videos == 8 and loader.group_of(np.arange(5)).tolist() == [0] * 5
    batches = collect(loader)
    assert [batch.step for batch in batches] == [0, 1, 2]
    for batch in batches:
        (clips,), (ids,) = batch.clips, batch.sample_ids
        assert clips.shape == (4, 4, 32, 32, 3) and clips.dtype == torch.uint8 and clips.is_contiguous()
        assert ids.tolist() == list(range(4 * batch.step, 4 * batch.step + 4))
    # The first two steps are one epoch of eight videos.
    assert sorted(batches[0].labels[0] + batches[1].labels[0]) == list(range(8))
    assert loader.broken() == [] and loader.num_tried == 8


def test_clips_are_what_sampling_says(config: Callable[..., DataConfig], video_folder: Path) -> None:
    cfg = config(seed=7, fps=12.0)
    (batch,) = collect(build_loader(cfg, start_step=5, num_steps=1))
    flips = set()
    for clip, label, sample in zip(batch.clips[0], batch.labels[0], batch.sample_ids[0].tolist(), strict=True):
        (dataset,), (video,) = sampling.choose_videos(np.array([sample]), [8], None, 7)
        assert (dataset, video) == (0, label)
        path, epoch = str(video_folder / f"{video}.mp4"), sample // 8
        index = build_index(path)
        numbers = sampling.clip_frames(sample, epoch, index.num_frames, 4, 2, 7)
        box = sampling.crop_box(sample, epoch, 48, 64, (0.3, 1.0), (0.75, 1.35), 7)
        flip = sampling.is_flipped(sample, epoch, 7)
        flips.add(flip)
        assert torch.equal(clip, torch.cat(decode_each(path, index, numbers, ToPixels(index, box, (32, 32), flip))))
    assert flips == {False, True}


def test_workers_change_nothing(config: Callable[..., DataConfig]) -> None:
    reference = collect(build_loader(config(), num_steps=4))
    for num_workers in (1, 2):
        assert_same(collect(build_loader(config(num_workers=num_workers), num_steps=4)), reference)


def test_resume_goes_on_where_it_stopped(config: Callable[..., DataConfig]) -> None:
    reference = collect(build_loader(config(), num_steps=5))
    loader = build_loader(config(num_workers=1))
    first = [batch for _, batch in zip(range(2), loader, strict=False)]
    assert loader.state_dict() == {"step": 2}
    # A second iteration of the same loader, then a new loader, then an older position.
    second = next(iter(loader))
    state = loader.state_dict()
    loader.load_state_dict({"step": 1})
    again = next(iter(loader))
    loader.close()
    other = build_loader(config(), num_steps=4)
    other.load_state_dict(state)
    third = next(iter(other))
    assert_same([*first, second, third, again], [*reference[:4], reference[1]])
    assert_same(collect(build_loader(config(), start_step=3, num_steps=2)), reference[3:])


def test_world_size_changes_nothing(config: Callable[..., DataConfig]) -> None:
    shared = {"batch_size": None, "global_batch_size": 4}
    (reference,) = collect(build_loader(config(**shared), start_step=3, num_steps=1))
    parts = [collect(build_loader(config(**shared), rank, 2, start_step=3, num_steps=1))[0] for rank in range(2)]
    assert torch.equal(torch.cat([part.clips[0] for part in parts]), reference.clips[0])
    assert torch.equal(torch.cat([part.sample_ids[0] for part in parts]), reference.sample_ids[0])
    assert parts[0].labels[0] + parts[1].labels[0] == reference.labels[0]


def test_mixed_frames_per_clip_and_images(
    config: Callable[..., DataConfig], video_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (50, 40), (number * 80, 10, 200)).save(tmp_path / "images" / f"{number}.png")
    csv = str(video_folder / "list.csv")
    cfg = config(
        datasets=[csv, str(tmp_path / "images"), csv], dataset_fpcs=[8, 2, 8], datasets_weights=[1, 1, 1], batch_size=12
    )
    loader = build_loader(cfg, num_steps=2)
    assert loader.fpcs == [8, 2]
    for batch in collect(loader):
        assert batch.group_ids == [0, 1]
        assert [clip.shape[1] for clip in batch.clips] == [8, 2]
        for group, clips, ids, labels in zip(batch.group_ids, batch.clips, batch.sample_ids, batch.labels, strict=True):
            assert len(clips) == len(ids) == len(labels)
            assert loader.group_of(ids.numpy()).tolist() == [group] * len(ids)
            assert torch.all(ids[1:] > ids[:-1])
        assert sorted(torch.cat(batch.sample_ids).tolist()) == list(range(12 * batch.step, 12 * batch.step + 12))
        still = batch.clips[1]
        assert torch.equal(still[:, 0], still[:, 1])
    everywhere = loader.group_of(np.arange(3000).reshape(30, 100))
    assert everywhere.shape == (30, 100) and abs(everywhere.mean() - 1 / 3) < 0.03


def spoil(folder: Path, video_folder: Path, num_good: int, bad: dict[str, bytes | None]) -> str:
    folder.mkdir()
    lines = [f"{video_folder}/{number}.mp4 {number}\n" for number in range(num_good)]
    for name, content in bad.items():
        if content is not None:
            (folder / name).write_bytes(content)
        lines.append(f"{folder}/{name} 99\n")
    (folder / "list.csv").write_text("".join(lines))
    return str(folder / "list.csv")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_videos_are_replaced_within_their_dataset(
    config: Callable[..., DataConfig],
    video_folder: Path,
    tmp_path: Path,
    num_workers: int,
    write_audio: Callable[[Path], Path],
) -> None:
    whole = (video_folder / "0.mp4").read_bytes()
    sound = write_audio(tmp_path / "sound.mp4").read_bytes()
    bad = {"empty.mp4": b"", "gone.mp4": None, "cut.mp4": whole[: len(whole) // 2], "sound.mp4": sound, "x.png": b"no"}
    name = spoil(tmp_path / "bad", video_folder, 3, bad)
    cfg = config(
        datasets=[name, str(video_folder / "list.csv")],
        dataset_fpcs=[4, 8],
        max_broken=0.5,
        num_workers=num_workers,
        batch_size=8,
    )
    loader = build_loader(cfg, num_steps=4)
    batches = collect(loader)
    for batch in batches:
        small = batch.labels[batch.group_ids.index(0)]
        assert set(small) <= {0, 1, 2}
    broken = {os.path.basename(video.path): video for video in loader.broken()}
    assert set(broken) == set(bad) and len(loader.broken()) == 5
    assert broken["gone.mp4"].reason == "the file does not exist" and broken["gone.mp4"].dataset == name
    assert "no video stream" in broken["sound.mp4"].reason
    assert loader.num_tried == 16


def test_too_many_broken_videos_stop_the_run(
    config: Callable[..., DataConfig], video_folder: Path, tmp_path: Path
) -> None:
    name = spoil(tmp_path / "bad", video_folder, 8, {f"{n}.mp4": b"" for n in range(2)})
    assert len(collect(build_loader(config(datasets=[name], max_broken=0.2), num_steps=8))) == 8
    with pytest.raises(UserError, match=r"max_broken=0.1 .*\n.*2 of the 10 videos tried|2 of the 10") as error:
        collect(build_loader(config(datasets=[name]), num_steps=8))
    assert "the file is empty" in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_broken_videos_gets_through_and_a_third_does_not(
    config: Callable[..., DataConfig], video_folder: Path, tmp_path: Path, seed: int
) -> None:
    good = [f"{video_folder}/{number % 8}.mp4 0\n" for number in range(180)]
    (tmp_path / "empty.mp4").touch()
    bad = [f"{tmp_path}/empty.mp4 99\n"]
    name = tmp_path / "list.csv"
    name.write_text("".join(good + 20 * bad))
    loader = build_loader(config(datasets=[str(name)], batch_size=20, seed=seed), num_steps=10)
    assert len(collect(loader)) == 10 and loader.num_tried == 200
    # When all are tried there is no chance left.
    name.write_text("".join(good + 21 * bad))
    with pytest.raises(UserError, match="21 of the 201 videos"):
        collect(build_loader(config(datasets=[str(name)], batch_size=3, seed=seed), num_steps=67))
    name.write_text("".join(good + 90 * bad))
    loader = build_loader(config(datasets=[str(name)], seed=seed), num_steps=60)
    with pytest.raises(UserError, match=r"data\.max_broken=0\.1"):
        collect(loader)
    assert loader.num_tried < 100


def fail_in_training_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HostFinisher,
        "wait",
        lambda self, started: Finished(started[0], [(position, "no") for position in range(len(started[0]))]),
    )


def test_clips_that_fail_in_the_training_process_are_replaced_until_there_are_none(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_training_process(monkeypatch)
    loader = build_loader(config(max_broken=1.0), num_steps=1)
    with pytest.raises(UserError, match="no usable video found .*8 of the 8 videos tried"):
        collect(loader)


def test_replacement_that_comes_back_is_no_endless_loop(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_training_process(monkeypatch)
    find = ClipReader.find
    monkeypatch.setattr(ClipReader, "find", lambda self, *arguments, after=None: find(self, *arguments))
    with pytest.raises(AssertionError):
        collect(build_loader(config(max_broken=1.0), num_steps=1))


@pytest.mark.parametrize("max_broken", [0.1, 1.0])
def test_all_videos_broken_is_an_error_at_once(
    config: Callable[..., DataConfig], video_folder: Path, tmp_path: Path, max_broken: float
) -> None:
    name = spoil(tmp_path / "bad", video_folder, 0, {f"{number}.mp4": b"" for number in range(300)})
    start = time.monotonic()
    with pytest.raises(UserError, match="no usable video found in dataset") as error:
        next(iter(build_loader(config(datasets=[name], max_broken=max_broken))))
    assert time.monotonic() - start < 30
    assert "51 of the 51 videos tried" in str(error.value) and "and 46 more" in str(error.value)


def test_short_videos_are_filtered_on_request(config: Callable[..., DataConfig]) -> None:
    """At 24 / 4 fps a clip of 4 frames takes 24; the videos have 20 to 27. Filtering is no damage."""
    loader = build_loader(config(fps=4.0, filter_short_videos=True), num_steps=6)
    labels = {label for batch in collect(loader) for label in batch.labels[0]}
    assert labels == {4, 5, 6, 7}
    assert len(loader.broken()) == 4 and all(video.filtered for video in loader.broken())
    kept = build_loader(config(fps=4.0), num_steps=2)
    assert {label for batch in collect(kept) for label in batch.labels[0]} == set(range(8))


def test_worker_ignores_interrupt_and_ends_on_close(config: Callable[..., DataConfig]) -> None:
    loader = build_loader(config(num_workers=1))
    batches = iter(loader)
    next(batches)
    (worker,) = loader.worker_pids()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    for _ in range(6):
        next(batches)
    loader.close()
    assert loader.worker_pids() == [] and not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_parent_leaves_no_orphans_and_scripts_need_no_main_guard(video_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from torch.utils.data._utils.worker import ManagerWatchdog\n"
        # PyTorch's own, which looks every five seconds, would do it too.
        "ManagerWatchdog.is_alive = lambda self: True\n"
        "from vjepa_fast.config.schema import DataConfig\n"
        "from vjepa_fast.data.loader import build_loader\n"
        f"cfg = DataConfig(datasets=[{str(video_folder / 'list.csv')!r}], batch_size=2, dataset_fpcs=[4], crop_size=32,"
        f" num_workers=2, cache_dir={str(tmp_path)!r})\n"
        "loader = build_loader(cfg)\nnext(iter(loader))\nprint(*loader.worker_pids(), flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(vjepa_fast.__file__).parents[1])},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def test_number_of_workers_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for cores, local, expected_cpu, expected_cuda in [
        (1, 1, 0, 1),
        (2, 1, 1, 1),
        (16, 4, 3, 3),
        (4, 8, 0, 1),
        (200, 1, 32, 32),
    ]:
        monkeypatch.setattr(workers, "available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert workers.auto_num_workers(cpu) == expected_cpu
        assert workers.auto_num_workers(cuda) == expected_cuda


@pytest.mark.gpu
def test_clips_arrive_on_the_gpu(config: Callable[..., DataConfig]) -> None:
    reference = collect(build_loader(config(), num_steps=2))
    for batch, expected in zip(
        collect(build_loader(config(num_workers=1), device="cuda", num_steps=2)), reference, strict=True
    ):
        assert batch.clips[0].is_cuda and batch.clips[0].dtype == torch.uint8
        assert torch.equal(batch.clips[0].cpu(), expected.clips[0])


def test_gpu_without_a_number_is_the_callers(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that read ahead have a current device of their own."""
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(loader_module, "make_backend", lambda cfg, device, batch_size: (asked.append(device), None))
    for device in ("cuda", "cuda:1", "cpu"):
        build_loader(config(), device=device)
    assert asked == [torch.device("cuda:3"), torch.device("cuda:1"), torch.device("cpu")]
