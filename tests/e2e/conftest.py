"""A tiny run: 8 videos of 24 clips an epoch, a 32 px model, 20 ms a step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.e2e.harness import Runner, no_leftovers

CONFIG = """
model: {{model_name: vit_tiny, embed_dim: 32, depth: 2, num_heads: 2, pred_depth: 1, pred_embed_dim: 16,
         pred_num_heads: 2}}
mask:
  masks:
  - {{num_blocks: 2, spatial_scale: [0.3, 0.3], aspect_ratio: [0.75, 1.5]}}
  - {{num_blocks: 1, spatial_scale: [0.5, 0.5], aspect_ratio: [0.75, 1.5]}}
data: {{datasets: [{csv}], dataset_fpcs: [4], global_batch_size: 4, fps: 8, crop_size: 32, patch_size: 8,
        num_workers: 1, shuffle: false, cache_dir: {cache}}}
optimization: {{epochs: 100, ipe: 6, ipe_scale: 1.0, warmup: 1, lr: 1.0e-3, ema: [0.99, 1.0]}}
train: {{log_every: 1, checkpoint_every: 3, device: cpu}}
"""
LATE = 5
"""The step that takes late.png, at --nproc 2 on the first process."""


def write_video(path: Path, seed: int, num_frames: int = 20) -> None:
    """A small H.264 file of moving noise."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "g": "8"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(num_frames):
            picture = np.roll(base, number * 3, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    os.environ["OMP_NUM_THREADS"] = "1"
    return Runner(tmp_path_factory.mktemp("streams"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(folder / f"{number}.mp4", number)
    Image.fromarray(np.random.default_rng(9).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "late.png")
    return folder


@pytest.fixture(scope="session")
def make_config(videos: Path) -> Callable[[Path], Path]:
    """Writes tiny.yaml and list.csv with 24 entries into a folder; one of them is the image late.png beside it."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        names = [str(videos / f"{number % 8}.mp4") for number in range(24)]
        names[4 * LATE] = str(folder / "late.png")
        shutil.copy(videos / "late.png", folder)
        (folder / "list.csv").write_text("".join(f"{name} 0\n" for name in names))
        config = folder / "tiny.yaml"
        config.write_text(CONFIG.format(csv=folder / "list.csv", cache=folder / "cache"))
        return config

    return make


@pytest.fixture(scope="session")
def uninterrupted(
    runner: Runner, make_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Run folder of 40 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runner.run("--config", make_config(folder), "--out", folder / "run", "--max-steps", 40)
    assert no_leftovers(folder)
    return folder / "run"


@pytest.fixture
def config(make_config: Callable[[Path], Path], tmp_path: Path) -> Path:
    return make_config(tmp_path)


@pytest.fixture
def stuck(config: Path, videos: Path) -> Callable[[], None]:
    """late.png is a pipe into which nothing is written, until the returned function puts the image there."""
    late = config.parent / "late.png"
    late.unlink()
    os.mkfifo(late)

    def free() -> None:
        late.unlink()
        shutil.copy(videos / "late.png", late)

    return free
