"""Videos that benchmarks of decoding make for themselves, packs of them, and the clips that are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from vjepa_fast.data import sampling
from vjepa_fast.data.decode.request import ClipRequest, Source
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.reader import Pack
from vjepa_fast.data.pack.writer import Summary, make_pack

SEED = 3
NUM_FRAMES, FPS = 16, 4


@dataclass(frozen=True)
class Kind:
    """Videos of ten seconds at 30 frames a second, by one encoder thread."""

    name: str
    height: int
    width: int
    codec: str
    options: dict[str, str]

    def write(self, folder: Path, count: int = 2) -> list[Path]:
        """Those that are not there yet."""
        paths = [folder / f"{self.name} {seed}.mp4".replace(" ", "_") for seed in range(count)]
        for seed, path in enumerate(paths):
            write_video(path, self.height, self.width, seed, codec=self.codec, **self.options)
        return paths


def _h264(height: int, width: int, gop: int) -> Kind:
    return Kind(
        f"{height}p H.264 GOP {gop}",
        height,
        width,
        "libx264",
        {"preset": "medium", "crf": "28", "g": str(gop), "threads": "1"},
    )


def _vp9(height: int, width: int, gop: int) -> Kind:
    return Kind(
        f"{height}p VP9 GOP {gop}",
        height,
        width,
        "libvpx-vp9",
        {"crf": "48", "b": "0", "g": str(gop), "deadline": "realtime", "cpu-used": "6", "threads": "1"},
    )


KINDS = [_h264(360, 640, 250), _h264(360, 640, 30), _h264(240, 426, 250), _h264(240, 426, 30), _vp9(360, 640, 30)]


def _pictures(height: int, width: int, seed: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    texture = np.kron(rng.random((height // 8 + 40, width // 8 + 80)), np.ones((8, 8))).astype(np.float32)
    texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1) + np.roll(texture, 2, 0)) / 4
    discs = rng.random((6, 5))
    for t in range(count):
        down, across = int(30 + 20 * np.cos(t / 55)), int(40 + 30 * np.sin(t / 40))
        back = texture[down : down + height, across : across + width] * 150 + 40
        picture = np.stack([back, back * 0.9 + 10, back * 0.8 + 20], axis=-1)
        for k, (left, top, right, below, radius) in enumerate(discs):
            centre_x = (left + (right - 0.5) * t / 100) % 1 * width
            centre_y = (top + (below - 0.5) * t / 100) % 1 * height
            inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < ((0.05 + 0.08 * radius) * height) ** 2
            picture[inside] = picture[inside] * 0.2 + 160 * np.array([k % 2, k // 2 % 2, k % 3 / 2])
        yield (picture + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8)


def write_video(
    path: Path, height: int, width: int, seed: int, *, num_frames: int = 300, codec: str = "libx264", **options: str
) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path) + ".part", "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in _pictures(height, width, seed, num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    os.replace(str(path) + ".part", path)


def pack_of(paths: list[Path], folder: Path) -> tuple[Pack, Summary]:
    """With what `vjepa-fast pack` does by default."""
    shutil.rmtree(folder, ignore_errors=True)
    made = make_pack([str(path) for path in paths], [0] * len(paths), folder, PackSettings(), num_workers=1)
    return Pack(str(folder)), made


def requests(sources: list[Source], count: int, size: tuple[int, int]) -> list[ClipRequest]:
    """Clips of 4 frames a second, a random window and crop each: those of a pack show about what those of its videos
    show."""
    out = []
    for sample in range(count):
        source = sources[sample % len(sources)]
        step = sampling.clip_step(source.avg_fps, NUM_FRAMES, fps=FPS)
        numbers = sampling.clip_frames(sample, 0, source.num_frames, NUM_FRAMES, step, SEED)
        box = sampling.crop_box(sample, 0, source.height, source.width, (0.3, 1.0), (0.75, 1.35), SEED)
        out.append(ClipRequest(source, numbers, box, size, sampling.is_flipped(sample, 0, SEED)))
    return out
