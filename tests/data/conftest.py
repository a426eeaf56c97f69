"""Tiny videos, made where they are used."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

WriteVideo = Callable[..., Path]


def picture(number: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(number).integers(0, 40, (height, width, 3))
    planes = [(x * 3 + number * 7) % 200, (y * 2 + number * 5) % 200, (x + y + number * 11) % 200]
    return (np.stack(planes, axis=-1) + noise).astype(np.uint8)


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    num_frames: int = 40,
    height: int = 48,
    width: int = 64,
    fps: int = 24,
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    audio: bool = False,
    container_options: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """A video file in which every frame is different; `pts` in units of 1/1000 s."""
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound: Any = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_tone(container, sound)
    return path


def write_audio(path: Path) -> Path:
    """A file with sound alone."""
    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream("aac", rate=16000, layout="mono"))
    return path


def _write_tone(container: Any, stream: Any) -> None:
    for _ in range(10):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture(name="write_video")
def _write_video() -> WriteVideo:
    return write_video


@pytest.fixture(name="write_audio")
def _write_audio() -> Callable[[Path], Path]:
    return write_audio


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight H.264 videos of 20 to 27 frames and list.csv, whose labels are their numbers."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(folder / f"{number}.mp4", num_frames=20 + number, preset="ultrafast", g="8", bf="2")
    (folder / "list.csv").write_text("".join(f"{number}.mp4 {number}\n" for number in range(8)))
    return folder
