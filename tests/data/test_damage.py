"""Damaged files: whatever the decoder says of one, the loader lists it and shows another video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.loader import build_loader

NUM_FRAMES = 20
NUM_FILES = 40


def says_something(path: Path) -> bool:
    """Whether decoding a file from its beginning to its end gives an error, a corrupt frame, or fewer than there are.

    How many there are is what the container says: if its tables are hit it may say another number, and nobody knows.
    """
    count = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    return True
                count -= bool(packet.size) and not packet.is_discard
                for frame in packet.decode():
                    if frame.is_corrupt:
                        return True
                    count += 1
    except (av.error.FFmpegError, IndexError):
        return True
    return count < 0


@pytest.mark.parametrize(
    ("codec", "options", "num_bits"),
    [
        ("libx264", {"preset": "ultrafast", "g": "8"}, 1),
        ("libx264", {"g": "8", "bf": "2"}, 4),
        ("libx265", {"g": "8"}, 4),
    ],
)
def test_every_word_of_the_decoder_is_listed(
    write_video: Callable[..., Path], tmp_path: Path, codec: str, options: dict[str, str], num_bits: int
) -> None:
    if codec == "libx265":
        options = {**options, "x265-params": "log-level=none"}
    good = write_video(tmp_path / "good.mp4", codec, num_frames=NUM_FRAMES, **options)
    whole = np.frombuffer(good.read_bytes(), np.uint8)
    rng = np.random.default_rng(4)
    lines, expected = [], set()
    for number in range(NUM_FILES):
        damaged = whole.copy()
        for place in rng.integers(len(whole), size=num_bits):
            damaged[place] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(damaged.tobytes())
        lines.append(f"{path} {number}\n")
        if says_something(path):
            expected.add(str(path))
    for number in range(NUM_FILES):
        lines.append(f"{good} {NUM_FILES + number}\n")
    (tmp_path / "list.csv").write_text("".join(lines))
    # A clip of all frames: what lies in those that are not wanted is not looked at.
    cfg = DataConfig(
        datasets=[str(tmp_path / "list.csv")],
        batch_size=NUM_FILES,
        dataset_fpcs=[NUM_FRAMES],
        frame_step=1,
        crop_size=32,
        num_workers=0,
        cache_dir=tmp_path / "cache",
        max_broken=1.0,
    )
    labels: list[Any] = []
    with build_loader(cfg, num_steps=2) as loader:
        for batch in loader:
            labels += batch.labels[0]
        listed = {video.path for video in loader.broken()}
    assert len(expected) > NUM_FILES // 10 and expected <= listed, sorted(expected - listed)
    assert not {path for path in listed if path == str(good)}
    assert len(labels) == 2 * NUM_FILES and not {f"{tmp_path}/{label}.mp4" for label in labels} & listed
