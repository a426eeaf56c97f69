"""What is decoded for a frame, and what happens to files that are not what they should be."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vjepa_fast.data.decode import index as index_module
from vjepa_fast.data.decode.convert import rgb_pixels
from vjepa_fast.data.decode.index import DecodeError, build_index, load_index, reading
from vjepa_fast.data.decode.pyav import decode_frames, decode_image, resize_clip
from vjepa_fast.data.decode.request import open_source
from vjepa_fast.data.sampling import Box, crop_box


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_only_what_is_wanted_is_decoded(
    tmp_path: Path, write_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame of the last GOP: neither the GOPs before it nor a second pass over the file."""
    path = write_video(tmp_path / "a.mp4", num_frames=120, g="12", bf="2")
    index = build_index(str(path))
    monkeypatch.setattr("vjepa_fast.data.decode.pyav._decode_all", lambda *_: pytest.fail("decoded from the start"))
    fed: list[int] = []

    class Codec:
        def __init__(self, codec: Any) -> None:
            object.__setattr__(self, "codec", codec)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.codec, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.codec, name, value)

        def decode(self, packet: Any) -> Any:
            fed.append(0 if packet is None else packet.pts)
            return self.codec.decode(packet)

    class Stream:
        def __init__(self, stream: Any) -> None:
            self.codec_context = Codec(stream.codec_context)

    original = index_module.open_video

    class Wrapped:
        def __init__(self, path: str) -> None:
            self.manager = original(path)

        def __enter__(self) -> Any:
            self.container, self.stream = self.manager.__enter__()
            return self, Stream(self.stream)

        def __exit__(self, *error: Any) -> Any:
            return self.manager.__exit__(*error)

        def demux(self, _: Any) -> Any:
            return self.container.demux(self.stream)

        def seek(self, offset: int, **_: Any) -> None:
            self.container.seek(offset, stream=self.stream)

    monkeypatch.setattr("vjepa_fast.data.decode.pyav.open_video", Wrapped)
    assert np.array_equal(decode_frames(str(path), index, np.array([110])), decode_all(path)[[110]])
    assert 2 <= len(fed) <= 13


def test_box_is_cut_out(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    path = write_video(tmp_path / "a.mp4")
    index = build_index(str(path))
    cut = decode_frames(str(path), index, np.array([3, 9]), Box(5, 7, 20, 31))
    assert np.array_equal(cut, decode_all(path)[[3, 9], 5:25, 7:38])


def test_cover_art_is_no_video(tmp_path: Path, write_audio: Callable[[Path], Path]) -> None:
    with pytest.raises(DecodeError, match="no video stream"):
        build_index(str(write_audio(tmp_path / "sound.mp4")))


def test_unusable_files_say_why(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    def reason(name: str, content: bytes | None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DecodeError) as error:
            index = build_index(str(path))
            decode_frames(str(path), index, np.arange(index.num_frames))
        return str(error.value)

    mp4 = write_video(tmp_path / "a.mp4", container_options={"movflags": "faststart"}).read_bytes()
    plain = write_video(tmp_path / "b.mp4").read_bytes()
    mkv = write_video(tmp_path / "c.mkv").read_bytes()
    assert reason("missing.mp4", None) == "the file does not exist"
    assert reason("empty.mp4", b"") == "the file is empty"
    assert "FFmpeg cannot read it" in reason("noise.mp4", os.urandom(4096))
    assert "FFmpeg cannot read it" in reason("text.mp4", b"this is not a video\n" * 50)
    assert "FFmpeg cannot read it" in reason("no_moov.mp4", plain[: len(plain) // 2])
    assert "truncated" in reason("cut.mp4", mp4[: len(mp4) * 2 // 3])
    with av.open(str(tmp_path / "a.mp4")) as container:
        end_of_a_frame = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[20]
    assert "truncated" in reason("cut_between.mp4", mp4[:end_of_a_frame])
    assert "truncated" in reason("cut.mkv", mkv[: len(mkv) // 2])
    head = len(mp4) - len(mp4) // 2
    assert reason("garbled.mp4", mp4[:head] + bytes(len(mp4) - head))


def test_directory_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(DecodeError):
        load_index(str(tmp_path), tmp_path)
    with pytest.raises(DecodeError):
        decode_image(str(tmp_path))


def test_index_is_cached_and_cache_survives_damage(
    tmp_path: Path, write_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = str(write_video(tmp_path / "a.mp4", bf="2")), tmp_path / "cache"
    built = load_index(path, cache)
    (entry,) = (file for file in cache.rglob("*") if file.is_file())
    whole = entry.read_bytes()
    for damaged in (b"", whole[:-3], whole[:-1] + b"\xff", b"{}", whole.replace(b'"version": 2', b'"version": 1')):
        entry.write_bytes(damaged)
        again = load_index(path, cache)
        assert np.array_equal(again.pts, built.pts) and entry.read_bytes() == whole
    monkeypatch.setattr(index_module, "build_index", lambda _: pytest.fail("built again"))
    cached = load_index(path, cache)
    for name in ("pts", "keyframes", "keyframe_dts"):
        assert np.array_equal(getattr(cached, name), getattr(built, name))
    assert (cached.num_frames, cached.avg_fps, cached.width, cached.height) == (40, 24.0, 64, 48)
    os.utime(path, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        load_index(path, cache)


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert load_index(str(write_video(tmp_path / "a.mp4")), blocked).num_frames == 40


def test_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(str(tmp_path / "a.png")), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert decode_image(str(tmp_path / "grey.png")).shape == (7, 9, 3)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(DecodeError):
        decode_image(str(tmp_path / "bad.jpg"))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DecodeError):
        decode_image(str(tmp_path / "cut.png"))


def test_an_image_that_is_too_large_to_open(tmp_path: Path) -> None:
    Image.new("L", (7, 9)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    for read in (open_source, decode_image):
        with pytest.raises(DecodeError, match=r"it is too large: Image size \(200000000 pixels\)"):
            read(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "it is too large: there is no memory for it"),
        (EOFError(), "it is damaged: EOFError"),
        (IndexError("no such row"), "it is damaged: no such row"),
        (struct.error("short"), "it is damaged: short"),
    ],
)
def test_whatever_reading_raises_is_a_reason(error: Exception, reason: str) -> None:
    with pytest.raises(DecodeError) as caught, reading("a.png"):
        raise error
    assert str(caught.value) == reason


@pytest.mark.parametrize("shape", [(96, 128), (48, 40), (37, 91), (1, 1), (64, 48)])
def test_resize_is_the_rounded_float_interpolation_within_one(shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    exact = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size=(64, 48), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    resized = resize_clip(frames, (64, 48))
    assert resized.dtype == torch.uint8 and resized.is_contiguous()
    assert (resized.float() - exact.round()).abs().max() <= 1
    assert abs(float((resized.float() - exact).mean())) < 0.5
    assert torch.equal(resize_clip(frames, (64, 48), flip=True), resized.flip(2))


def test_clips_of_packs_and_of_videos_are_resized_alike() -> None:
    """The figures of docs/packs.md."""
    rng = np.random.default_rng(0)
    differences = []
    for sample in range(50):
        rgb = rng.integers(0, 256, (256, 448, 3), dtype=np.uint8)
        box = crop_box(sample, 0, 256, 448, (0.3, 1.0), (0.75, 1.35), 239)
        cut = rgb[None, box.top : box.top + box.height, box.left : box.left + box.width]
        differences.append(resize_clip(cut, (256, 256)).int() - rgb_pixels(rgb, box, (256, 256), False).int())
    all_of_them = torch.stack(differences)
    assert all_of_them.abs().max() == 1 and 0.15 < (all_of_them != 0).double().mean() < 0.2
    means = all_of_them.double().mean(dim=(1, 2, 3, 4))
    assert means.min() > -0.01 and means.max() < 0.07
