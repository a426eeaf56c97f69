"""Core-milliseconds of a raw clip: the reference's way beside ours; and which damaged files nobody can tell.

    python -m benchmarks.compare_decode --folder /tmp/videos

16 frames of a random window of 112, cropped at random, to 256 px, from ten seconds of 30 frames a second (x264 medium,
crf 28, one thread): a panning texture, moving discs and noise. User and system time of this process (getrusage), one
thread, lowest of three rounds of ten clips.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa_fast.data import sampling
from vjepa_fast.data.decode.index import DecodeError, VideoIndex, build_index
from vjepa_fast.data.decode.pyav import decode_clip, decode_each, decode_frames, resize_clip
from vjepa_fast.data.decode.request import ClipRequest, VideoSource

_SIZE, _NUM_CLIPS, _NUM_ROUNDS = (256, 256), 10, 3
_MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
_STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)


def _pictures(height: int, width: int, seed: int, count: int) -> Any:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    texture = np.kron(rng.random((height // 8 + 40, width // 8 + 80)), np.ones((8, 8))).astype(np.float32)
    texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1) + np.roll(texture, 2, 0)) / 4
    discs = rng.random((6, 5))
    for t in range(count):
        down, across = int(30 + 20 * np.cos(t / 55)), int(40 + 30 * np.sin(t / 40))
        back = texture[down:down + height, across:across + width] * 150 + 40
        picture = np.stack([back, back * 0.9 + 10, back * 0.8 + 20], axis=-1)
        for k, (left, top, right, below, radius) in enumerate(discs):
            centre_x = (left + (right - 0.5) * t / 100) % 1 * width
            centre_y = (top + (below - 0.5) * t / 100) % 1 * height
            inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < ((0.05 + 0.08 * radius) * height) ** 2
            picture[inside] = picture[inside] * 0.2 + 160 * np.array([k % 2, k // 2 % 2, k % 3 / 2])
        yield (picture + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8)


def write_video(path: Path, height: int, width: int, seed: int, *, num_frames: int = 300, codec: str = "libx264",
                **options: str) -> None:
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


def reference_way(request: ClipRequest) -> Tensor:
    """Every frame from the keyframe on decoded, whole RGB frames in fp32 cropped, resized and normalised."""
    found = {}
    numbers = request.frame_numbers
    with av.open(request.source.path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rate = Fraction(stream.average_rate or 30)
        assert stream.time_base is not None
        container.seek(round(int(numbers[0]) / rate / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            assert frame.pts is not None
            number = round(frame.pts * stream.time_base * rate)
            if number in numbers:
                found[number] = frame.to_ndarray(format="rgb24")
            if number >= numbers[-1]:
                break
    clip = torch.from_numpy(np.stack([found[int(number)] for number in numbers])).float().permute(3, 0, 1, 2)
    top, left, height, width = request.box
    clip = clip[:, :, top:top + height, left:left + width]
    clip = F.interpolate(clip, size=request.size, mode="bilinear", align_corners=False)
    return ((clip.flip(-1) if request.flip else clip) - _MEAN) / _STD


def by_swscale(request: ClipRequest) -> Tensor:
    """As ours, but by way of RGB frames and PyTorch's resize of uint8."""
    assert isinstance(request.source, VideoSource)
    frames = decode_frames(request.source.path, request.source.index, request.frame_numbers, request.box)
    return resize_clip(frames, request.size, request.flip)


def decode_only(request: ClipRequest) -> object:
    assert isinstance(request.source, VideoSource)
    return decode_each(request.source.path, request.source.index, request.frame_numbers, lambda _: None)


WAYS: dict[str, Callable[[ClipRequest], object]] = {
    "reference": reference_way, "ours": decode_clip, "ours by RGB frames": by_swscale, "decoding alone": decode_only}


def core_ms() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (usage.ru_utime + usage.ru_stime)


def requests(paths: list[Path], indices: list[VideoIndex]) -> list[ClipRequest]:
    out = []
    for sample in range(_NUM_CLIPS):
        path, index = str(paths[sample % len(paths)]), indices[sample % len(paths)]
        numbers = sampling.clip_frames(sample, 0, index.num_frames, 16, 7, 3)
        box = sampling.crop_box(sample, 0, index.height, index.width, (0.3, 1.0), (0.75, 1.35), 3)
        out.append(ClipRequest(VideoSource(path, index), numbers, box, _SIZE, sampling.is_flipped(sample, 0, 3)))
    return out


def costs(folder: Path) -> None:
    print("| source | " + " | ".join(WAYS) + " | ours / reference | index |\n|---|" + "---|" * (len(WAYS) + 2))
    differences = []
    for height, width in ((360, 640), (240, 426)):
        for gop in (250, 30):
            paths = [folder / f"{height}_{gop}_{seed}.mp4" for seed in range(2)]
            for seed, path in enumerate(paths):
                write_video(path, height, width, seed, preset="medium", crf="28", g=str(gop), threads="1")
            before = core_ms()
            indices = [build_index(str(path)) for path in paths]
            index_ms = (core_ms() - before) / len(paths)
            clips, found = requests(paths, indices), {name: float("inf") for name in WAYS}
            # In turn, because the machine may have other work.
            for _ in range(_NUM_ROUNDS):
                for name, way in WAYS.items():
                    before = core_ms()
                    for clip in clips:
                        way(clip)
                    found[name] = min(found[name], (core_ms() - before) / len(clips))
            row = " | ".join(f"{value:.0f}" for value in found.values())
            ratio = found["ours"] / found["reference"]
            print(f"| {height}p GOP {gop} | {row} | {ratio:.2f} | {index_ms:.1f} |", flush=True)
            if gop == 250:
                less = torch.stack([decode_clip(clip).float() - by_swscale(clip).float() for clip in clips[:4]])
                differences.append(f"{height}p: ours less that by RGB frames is {less.mean():.2f} on average, "
                                   f"{less.abs().mean():.2f} in size, {less.abs().max():.0f} at most")
    print("\n" + "\n".join(differences))


def bit_flips(folder: Path, num_files: int = 60) -> None:
    """All frames of files in which some bits were flipped at random places."""
    print("\n| codec | bits flipped | a reason is given | wrong frames without one | no frame is wrong |")
    print("|---|---|---|---|---|")
    encoders: dict[str, dict[str, Any]] = {"h264": {"codec": "libx264", "bf": "2", "g": "48", "preset": "veryfast"},
                "hevc": {"codec": "libx265", "preset": "ultrafast", "x265-params": "keyint=48:log-level=none:pools=1"},
                "vp9": {"codec": "libvpx-vp9", "g": "48", "deadline": "realtime", "cpu-used": "8"}}
    for name, options in encoders.items():
        path, damaged = folder / f"flip_{name}.mp4", folder / "damaged.mp4"
        write_video(path, 96, 128, 0, num_frames=96, **options)
        data, whole = path.read_bytes(), decode_frames(str(path), build_index(str(path)), np.arange(96))
        for num_bits in (1, 8):
            rng, outcomes = np.random.default_rng(0), [0, 0, 0]
            for _ in range(num_files):
                changed = bytearray(data)
                for place in rng.integers(0, len(data), num_bits):
                    changed[place] ^= 1 << rng.integers(8)
                damaged.write_bytes(changed)
                try:
                    index = build_index(str(damaged))
                    frames = decode_frames(str(damaged), index, np.arange(index.num_frames))
                    outcomes[1 + int(np.array_equal(frames, whole))] += 1
                except DecodeError:
                    outcomes[0] += 1
            print(f"| {name} | {num_bits} | {outcomes[0]} | {outcomes[1]} | {outcomes[2]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the videos are made")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    costs(folder)
    bit_flips(folder)


if __name__ == "__main__":
    main()
