"""A slice decodes to the pixels of the whole file, holds little more than it must, and is refused where it cannot."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vjepa_fast.data.decode.index import DecodeError, build_index
from vjepa_fast.data.decode.packets import packet_reader
from vjepa_fast.data.decode.remux import Slice, Unsliceable, cut

H264 = {"codec": "libx264", "preset": "fast", "name": "a.mp4"}
HEVC = {"codec": "libx265", "name": "a.mp4"}
VP9 = {"codec": "libvpx-vp9", "name": "a.webm", "deadline": "realtime", "cpu-used": "8"}
X265 = "bframes=3:log-level=none:pools=1:frame-threads=1"
TWO_LAYERS = (
    "ts_number_layers=2:ts_target_bitrate=300,500:ts_rate_decimator=2,1:ts_periodicity=2:ts_layer_id=0,1:"
    "ts_layering_mode=2"
)
CASES: dict[str, dict[str, Any]] = {
    "h264-gop-1": {**H264, "g": "1"},
    "h264-gop-30": {**H264, "g": "30", "bf": "3", "b-pyramid": "normal"},
    "h264-gop-250": {**H264, "g": "250", "bf": "2"},
    "h264-no-b-frames": {**H264, "g": "30", "bf": "0"},
    "h264-open-gop": {**H264, "name": "a.mkv", "x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"},
    "h264-start-codes": {**H264, "name": "a.ts", "g": "12", "bf": "2"},
    "h264-slices": {**H264, "g": "30", "bf": "2", "x264-params": "slices=3"},
    "h264-vfr": {**H264, "name": "a.mkv", "g": "10", "bf": "2", "pts": np.cumsum([7, 90, 33, 20] * 20).tolist()},
    "h264-fragments": {**H264, "g": "12", "bf": "2", "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc-gop-1": {**HEVC, "x265-params": f"keyint=1:{X265}"},
    "hevc-gop-30": {**HEVC, "x265-params": f"keyint=30:min-keyint=30:open-gop=0:{X265}"},
    "hevc-gop-250": {**HEVC, "x265-params": f"keyint=250:{X265}"},
    "hevc-open-gop": {**HEVC, "name": "a.mkv", "x265-params": f"keyint=12:min-keyint=12:open-gop=1:{X265}"},
    "hevc-leading": {**HEVC, "x265-params": f"keyint=12:min-keyint=12:open-gop=0:radl=2:{X265}"},
    "hevc-sublayers": {**HEVC, "x265-params": f"keyint=30:temporal-layers=1:{X265}"},
    "vp9-gop-1": {**VP9, "g": "1"},
    "vp9-gop-30": {**VP9, "g": "30"},
    "vp9-gop-250": {**VP9, "g": "250"},
    "vp9-hidden": {**VP9, "cpu-used": "6", "auto-alt-ref": "1", "lag-in-frames": "25", "g": "80", "b": "200000"},
    "vp9-layers": {
        **VP9,
        "g": "30",
        "lag-in-frames": "0",
        "error-resilient": "1",
        "b": "500000",
        "ts-parameters": TWO_LAYERS,
    },
    "mjpeg": {"codec": "mjpeg", "name": "a.avi", "pix_fmt": "yuvj420p"},
}
NOT_DISPOSABLE = {"h264-no-b-frames", "vp9-gop-30", "vp9-gop-250", "vp9-hidden"}


def take(*_: Any) -> None:
    """Refuses nothing."""


def decode(file: Any) -> np.ndarray:
    with av.open(file) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def num_packets(part: Slice) -> int:
    with av.open(io.BytesIO(part.data)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


@pytest.mark.parametrize("case", CASES)
def test_slice_equals_the_whole_decode_to_the_bit(case: str, tmp_path: Path, write_video: Callable[..., Path]) -> None:
    options = dict(CASES[case])
    path = write_video(tmp_path / options.pop("name"), num_frames=80, **options)
    whole, index = decode(str(path)), build_index(str(path))
    assert len(whole) == index.num_frames == 80
    rng = np.random.default_rng(0)
    wanted = [start + np.linspace(0, 44, 7).astype(np.int64) for start in rng.integers(0, 36, 6)]
    wanted += [np.array([number]) for number in rng.permutation(80)[:6]] + [np.array([70, 3, 70, 3]), np.arange(80)]
    refused = 0
    for numbers in wanted:
        try:
            part = cut(str(path), index, numbers, take)
        except Unsliceable as why:
            assert case == "h264-open-gop" and "open groups" in str(why)
            refused += 1
            continue
        decoded = decode(io.BytesIO(part.data))
        # DALI counts the frames that come out.
        assert len(decoded) == num_packets(part) and np.all(np.diff(part.frames) > 0)
        assert np.array_equal(decoded[part.frames[part.places]], whole[numbers]), numbers
        needless = len(decoded) - len(part.frames)
        if case in ("h264-gop-1", "hevc-gop-1", "vp9-gop-1", "mjpeg"):
            assert needless == 0
        elif len(numbers) == 7 and case not in NOT_DISPOSABLE:
            assert needless < numbers[-1] - index.keyframes[index.keyframes <= numbers[0]][-1] + 1 - 7
    assert refused < len(wanted) - 1


def test_hidden_pictures_are_noticed(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    for case, single in (("vp9-hidden", False), ("vp9-gop-30", True), ("h264-gop-30", True)):
        options = dict(CASES[case])
        path = str(write_video(tmp_path / f"{case}-{options.pop('name')}", num_frames=80, **options))
        assert cut(path, build_index(path), np.arange(60), take).single == single


def test_fields_are_noticed() -> None:
    read = packet_reader("h264", None)
    assert read is not None
    frame, field = b"\0\0\1\x65\x88\x84\x00\x10", b"\0\0\1\x61\x9a\x00\x00\x10"
    assert read(frame) == (True, True) and read(field) == (False, True) and read(frame + field) == (True, False)
    # The second slice of a picture does not begin at its first macroblock.
    assert read(frame + b"\0\0\1\x65\x08\x84\x00\x10").is_single


def test_what_cannot_be_cut_says_what_it_is(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    raw = str(write_video(tmp_path / "a.h264", g="12"))
    with pytest.raises(Unsliceable, match="without usable timestamps"):
        cut(raw, build_index(raw), np.arange(3), take)
    mpeg4 = str(write_video(tmp_path / "a.mp4", "mpeg4"))
    with pytest.raises(Unsliceable, match="^mpeg4 video$"):
        cut(mpeg4, build_index(mpeg4), np.arange(3), take)
    with pytest.raises(Unsliceable, match="^mpeg4 yuv420p 64x48$"):
        cut(mpeg4, build_index(mpeg4), np.arange(3), lambda *about: "{} {} {}x{}".format(*about))


def test_file_that_has_changed_or_gone(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    path = write_video(tmp_path / "a.mp4", g="12")
    index = build_index(str(path))
    write_video(path, num_frames=20, g="12")
    with pytest.raises(Unsliceable, match="not found by its time"):
        cut(str(path), index, np.array([30]), take)
    path.unlink()
    with pytest.raises(DecodeError, match="does not exist"):
        cut(str(path), index, np.array([3]), take)


def test_video_that_begins_between_keyframes(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """What an edit list leaves of a group of pictures is displayed, but its keyframe is not."""
    path = str(write_video(tmp_path / "a.mp4", g="12"))
    index = build_index(path)
    later = dataclasses.replace(index, keyframes=index.keyframes[1:], keyframe_dts=index.keyframe_dts[1:])
    with pytest.raises(Unsliceable, match="between two keyframes"):
        cut(path, later, np.array([5, 20]), take)
    assert len(cut(path, later, np.array([12, 20]), take).frames) == 2
