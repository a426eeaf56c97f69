"""Packs hold the JPEG of the decoded frames; the same bytes at any number of workers and after any interruption."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import os
import random
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.convert import ToPixels
from vjepa_fast.data.decode.index import DecodeError, build_index
from vjepa_fast.data.decode.pyav import decode_each
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.pack import state, writer
from vjepa_fast.data.pack.encode import rgb_frames
from vjepa_fast.data.pack.index import PackSettings, read_index
from vjepa_fast.data.pack.writer import Summary, make_pack
from vjepa_fast.data.sampling import Box

# Small shards, so that eight tiny videos fill several.
SETTINGS = PackSettings(fps=8.0, short_side=32, shard_bytes=35_000)
WriteVideo = Callable[..., Path]


def pack(
    source: Path | str, out: Path, settings: PackSettings = SETTINGS, num_workers: int = 2, **options: Any
) -> Summary:
    return make_pack(*read_manifest(str(source)), out, settings, num_workers=num_workers, **options)


def frames_of(path: str, numbers: np.ndarray) -> list[np.ndarray]:
    """Whole frames, 48 x 64, as the loader makes pixels of them."""
    index = build_index(path)
    frames = decode_each(path, index, numbers, ToPixels(index, Box(0, 0, 48, 64), (48, 64), flip=False))
    return [frame[0].numpy() for frame in frames]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def packed(video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "whole"
    pack(video_folder / "list.csv", out, num_workers=1)
    return out


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members by key and extension, as WebDataset groups them: consecutive files with one name up to the first dot."""
    found: dict[str, dict[str, bytes]] = {}
    last = ""
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert key == last or key not in found
                last = key
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return found


def test_members_are_the_jpeg_of_the_decoded_frames(packed: Path, video_folder: Path) -> None:
    found = samples(packed)
    assert sorted(found) == [f"{number:08d}" for number in range(8)]
    for number in range(8):
        path = str(video_folder / f"{number}.mp4")
        sample = found[f"{number:08d}"]
        about = json.loads(sample.pop("json"))
        index = build_index(path)
        # 24 frames a second, 8 kept.
        numbers = np.arange(0, index.num_frames, 3)
        assert about == {
            "label": number,
            "path": path,
            "num_frames": len(numbers),
            "fps": 8.0,
            "phases": 1,
            "height": 32,
            "width": 32,
            "source": {"fps": 24.0, "height": 48, "width": 64, "frames": numbers.tolist()},
        }
        assert sorted(sample) == [f"{k:06d}.jpg" for k in range(len(numbers))]
        for k, frame in enumerate(frames_of(path, numbers)):
            expected = io.BytesIO()
            Image.fromarray(frame).resize((32, 32), Image.Resampling.BICUBIC).save(
                expected, "JPEG", quality=90, subsampling="4:2:0", optimize=True
            )
            assert sample[f"{k:06d}.jpg"] == expected.getvalue()


def test_index_finds_every_member(packed: Path) -> None:
    index = read_index(packed / "pack.index", "packed")
    assert index.labels == list(range(8)) and index.settings == SETTINGS
    shards = [file.read_bytes() for file in sorted(packed.glob("shard-*.tar"))]
    assert len(shards) > 2 and [len(shard) for shard in shards] == index.shard_bytes.tolist()
    assert max(map(len, shards)) <= SETTINGS.shard_bytes
    found = samples(packed)
    for video in range(8):
        first, end = index.video_first[video : video + 2].tolist()
        sample = found[f"{index.video_number[video]:08d}"]
        assert len(sample) == end - first + 1
        for k, frame in enumerate(range(first, end)):
            start, size = int(index.frame_offset[frame]), int(index.frame_bytes[frame])
            assert shards[index.video_shard[video]][start : start + size] == sample[f"{k:06d}.jpg"]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_workers(packed: Path, video_folder: Path, tmp_path: Path, num_workers: int) -> None:
    pack(video_folder / "list.csv", tmp_path / "out", num_workers=num_workers)
    assert contents(tmp_path / "out") == contents(packed)


def test_psnr_and_sizes_are_true(video_folder: Path, tmp_path: Path) -> None:
    source = video_folder / "7.mp4"
    summary = pack(source, tmp_path / "out", PackSettings(fps=24.0, short_side=32))
    (sample,) = samples(tmp_path / "out").values()
    frames = frames_of(str(source), np.arange(27))
    errors = []
    for k in (0, 16):
        was = np.asarray(Image.fromarray(frames[k]).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64)
        errors.append(np.mean((was - np.asarray(Image.open(io.BytesIO(sample[f"{k:06d}.jpg"])))) ** 2))
    assert summary.num_sampled == 2 and summary.num_frames == 27
    assert summary.psnr == pytest.approx(10 * np.log10(255**2 / np.mean(errors)))
    assert summary.num_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert summary.source_bytes == source.stat().st_size


def test_images_labels_and_equal_names(video_folder: Path, tmp_path: Path, write_video: WriteVideo) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "same.mp4", num_frames=9 + (name == "b"))
    Image.new("RGB", (100, 80), (200, 30, 30)).save(tmp_path / "still.png")
    (tmp_path / "list.csv").write_text("a/same.mp4::a dog\nb/same.mp4 7\nstill.png::ein Bär\n")
    summary = pack(tmp_path / "list.csv", tmp_path / "out", PackSettings(fps=24.0, short_side=32))
    assert summary.num_videos == 3
    index = read_index(tmp_path / "out" / "pack.index", "packed")
    assert index.labels == ["a dog", 7, "ein Bär"] and np.diff(index.video_first).tolist() == [9, 10, 1]
    assert index.video_phases.tolist() == [1, 1, 0] and index.video_width.tolist() == [32, 32, 32]
    assert [path.removeprefix(str(tmp_path)) for path in index.paths] == ["/a/same.mp4", "/b/same.mp4", "/still.png"]


@pytest.fixture
def with_broken(video_folder: Path, tmp_path: Path) -> Path:
    """Eight good videos, one cut short, one with damage in the middle, one that is missing."""
    data = (video_folder / "0.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    start = data.index(b"mdat") + 2000
    (tmp_path / "holes.mp4").write_bytes(data[:start] + bytes(1500) + data[start + 1500 :])
    lines = (video_folder / "list.csv").read_text().splitlines()
    rows = [f"{video_folder}/{line}" for line in lines]
    rows[2:2] = [f"{tmp_path}/cut.mp4 1", f"{tmp_path}/holes.mp4 1"]
    (tmp_path / "list.csv").write_text("\n".join([*rows, f"{tmp_path}/gone.mp4 1"]))
    return tmp_path / "list.csv"


def test_broken_videos_are_left_out_and_listed(with_broken: Path, tmp_path: Path) -> None:
    summary = pack(with_broken, tmp_path / "out", max_broken=0.5)
    assert (summary.num_videos, summary.num_broken) == (8, 3)
    lines = (tmp_path / "out" / "broken.tsv").read_text().splitlines()
    assert [line.split("\t")[0].rpartition("/")[2] for line in lines] == ["path", "cut.mp4", "holes.mp4", "gone.mp4"]
    assert lines[3].endswith("\tthe file does not exist")
    assert read_index(tmp_path / "out" / "pack.index", "packed").video_number.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]


def test_too_many_broken_videos(with_broken: Path, tmp_path: Path, video_folder: Path) -> None:
    with pytest.raises(UserError, match=r"more than --max-broken 0\.1 of the videos.*\n.*cut\.mp4: FFmpeg cannot"):
        pack(with_broken, tmp_path / "out", num_workers=1)
    # What has come back is looked at again.
    (tmp_path / "gone.mp4").write_bytes((video_folder / "0.mp4").read_bytes())
    assert pack(with_broken, tmp_path / "out", max_broken=0.2).num_broken == 2


def run_and_kill(source: Path, out: Path, place: int) -> None:
    """Packs in a process of its own that is killed at the place-th renaming, by whichever of its processes."""
    renamings = out.with_suffix(".count")
    renamings.touch()
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    main, rename = os.getpid(), os.replace

    def replace(*names: Any) -> None:
        with renamings.open("a") as file:
            file.write("x")
        # Two processes may count at once, and then neither sees every number.
        if renamings.stat().st_size >= place:
            os.kill(main, signal.SIGKILL)
            os._exit(1)
        rename(*names)

    os.replace = replace  # type: ignore[assignment]
    try:
        pack(source, out)
    finally:
        os._exit(0)


@pytest.mark.parametrize("place", [1, 4, 12, 17, 22, 24])
def test_killed_and_resumed(packed: Path, video_folder: Path, tmp_path: Path, place: int) -> None:
    out = tmp_path / "out"
    run_and_kill(video_folder / "list.csv", out, place)
    assert not (out / "pack.index").exists()
    # Half a part, as a loss of power leaves it.
    parts = sorted((out / state.UNFINISHED / "parts").glob("*.tar"))
    if parts:
        parts[0].write_bytes(parts[0].read_bytes()[:700])
    pack(video_folder / "list.csv", out)
    assert contents(out) == contents(packed)


def test_what_is_done_is_not_done_again(
    packed: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tmp_path / "done"
    encode = writer.encode_video

    def stop_after_six(path: str, *args: Any) -> Any:
        if done.exists() and done.stat().st_size == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        with done.open("a") as file:
            file.write(Path(path).stem)
        return encode(path, *args)

    monkeypatch.setattr(writer, "encode_video", stop_after_six)
    with pytest.raises(UserError, match="the disk is full; free some space and run the same command to continue"):
        pack(video_folder / "list.csv", tmp_path / "out", num_workers=1)
    first = done.read_text()
    done.unlink()
    summary = pack(video_folder / "list.csv", tmp_path / "out", num_workers=1)
    assert sorted(first + done.read_text()) == list("01234567") and len(first) == 6
    assert contents(tmp_path / "out") == contents(packed) and summary.num_videos == 8


def test_full_disk_while_a_shard_is_written(
    packed: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(state.shutil, "copyfileobj", full)
        with pytest.raises(UserError, match="the disk is full"):
            pack(video_folder / "list.csv", tmp_path / "out")
    pack(video_folder / "list.csv", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)


def test_a_lost_shard_is_made_again(
    packed: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(writer, "encode_index", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(video_folder / "list.csv", tmp_path / "out")
    os.truncate(tmp_path / "out" / "shard-000001.tar", 5000)
    pack(video_folder / "list.csv", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)


def test_a_video_that_kills_its_decoder(video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = writer.encode_video

    def crash(path: str, *args: Any) -> Any:
        if path.endswith("3.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(path, *args)

    monkeypatch.setattr(writer, "encode_video", crash)
    summary = pack(video_folder / "list.csv", tmp_path / "out", max_broken=0.2)
    assert (summary.num_videos, summary.num_broken) == (7, 1)
    reason = "it ends the process that decodes it (SIGKILL, most often: no memory is left)"
    assert f"3.mp4\t{reason}\n" in (tmp_path / "out" / "broken.tsv").read_text()


def test_an_error_that_nobody_expects(video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = writer.encode_video
    errors = {"2": ZeroDivisionError("by\tzero\nin it", lambda: None), "5": NotImplementedError()}

    def fail(path: str, *args: Any) -> Any:
        if Path(path).stem in errors:
            raise errors[Path(path).stem]
        return encode(path, *args)

    monkeypatch.setattr(writer, "encode_video", fail)
    summary = pack(video_folder / "list.csv", tmp_path / "out", max_broken=0.3)
    assert (summary.num_videos, summary.num_broken) == (6, 2)
    with (tmp_path / "out" / "broken.tsv").open(newline="") as file:
        reasons = [row[1] for row in csv.reader(file, delimiter="\t")]
    assert reasons[0] == "reason" and reasons[1].startswith("ZeroDivisionError: ('by")
    assert reasons[2] == "NotImplementedError"


def test_other_settings_are_refused(video_folder: Path, packed: Path, tmp_path: Path) -> None:
    before = contents(packed)
    with pytest.raises(UserError, match=r"quality 90\b.*\b80\b"):
        pack(video_folder / "list.csv", packed, PackSettings(8.0, 32, 80, False, 35_000))
    with pytest.raises(UserError, match=r"videos 8 \(now 1\)"):
        pack(video_folder / "1.mp4", packed)
    summary = pack(video_folder / "list.csv", packed)
    assert contents(packed) == before and summary.psnr is None and summary.num_videos == 8
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is no pack and not empty; expected a new folder"):
        pack(video_folder / "list.csv", tmp_path)


def test_two_at_once(video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_LOCK_SECONDS", 0.2)
    first = state.State(tmp_path / "out")
    first.begin({"fps": 8.0})
    with (
        first.lock(),
        pytest.raises(UserError, match="another `vjepa-fast pack` is writing to"),
        state.State(tmp_path / "out").lock(),
    ):
        pass


@pytest.mark.parametrize(("name", "is_after"), [("begin", False), ("begin", True), ("lock", False)])
def test_another_command_is_faster(
    packed: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_after: bool
) -> None:
    """It does all its work between two steps of this one."""
    step = getattr(state.State, name)

    def other_first(self: state.State, *args: Any) -> Any:
        monkeypatch.undo()
        if is_after:
            step(self, *args)
        pack(video_folder / "list.csv", tmp_path / "out")
        return None if is_after else step(self, *args)

    monkeypatch.setattr(state.State, name, other_first)
    summary = pack(video_folder / "list.csv", tmp_path / "out")
    assert summary.num_videos == 8 and summary.psnr is None
    assert contents(tmp_path / "out") == contents(packed)


def test_a_lock_that_cannot_be_had(video_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / state.UNFINISHED / "lock").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write pack .*out: Is a directory"):
        pack(video_folder / "list.csv", tmp_path / "out")


def test_damaged_index(packed: Path, tmp_path: Path) -> None:
    data = bytearray((packed / "pack.index").read_bytes())
    place = random.Random(0).randrange(1000, len(data))
    data[place] ^= 4
    for content, message in (
        (bytes(data), "checksum"),
        (b"tar", "is no index of a pack"),
        (b"", "is no index"),
        (bytes(data)[:900], "is damaged"),
    ):
        (tmp_path / "pack.index").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / "pack.index", "here")


def test_every_frame_has_to_be_there(video_folder: Path) -> None:
    path = str(video_folder / "0.mp4")
    index = build_index(path)
    step = int(index.pts[1] - index.pts[0])
    # As if the decoder had left one out, in the middle and at the end.
    for place, number in ((7, 7), (20, 20)):
        pts = np.insert(index.pts, place, index.pts[place - 1] + step // 2)
        more = dataclasses.replace(index, num_frames=21, pts=pts)
        with pytest.raises(DecodeError, match=f"frame {number} of 21 cannot be decoded"):
            list(rgb_frames(path, more, np.arange(1)))
    assert len(list(rgb_frames(path, index, np.array([3, 9])))) == 2
