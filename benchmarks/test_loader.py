"""Clips from video files: decode, crop, resize, flip, collate. What it costs in core-milliseconds a clip.

The files are the demo's own kind of video at the size of a raw dataset: 256 px, 30 frames a second, 4 of them read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vjepa_fast.bench.loader import read_batches
from vjepa_fast.bench.workload import TRIAL, Workload
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.generated.synthetic import make_synthetic
from vjepa_fast.data.workers import auto_num_workers

_BATCH = 4


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, workload: Workload) -> Path:
    """Manifest of the files, made once."""
    num_frames = 40 if workload is TRIAL else 150
    folder = tmp_path_factory.mktemp("videos")
    return make_synthetic(folder, 8, 1, size=256, num_frames=num_frames, fps=30).train_csv


@pytest.mark.parametrize("workers", ["none", "auto"])
def test_loader(benchmark: Any, videos: Path, workload: Workload, device: torch.device, workers: str) -> None:
    """`none` decodes in this process, so its CPU time is known exactly; `auto` is what training does."""
    num_workers = 0 if workers == "none" else auto_num_workers(device)
    cfg = DataConfig(
        datasets=[str(videos)],
        dataset_fpcs=[workload.num_frames],
        batch_size=_BATCH,
        fps=4,
        crop_size=workload.config.data.crop_size,
        num_workers=num_workers,
        cache_dir=videos.parent / "cache",
    )
    num_batches = 2 if workload is TRIAL else 8
    benchmark.extra_info.update(workload=workload.name, device="cpu", num_workers=num_workers)
    found = benchmark.pedantic(lambda: read_batches(cfg, device, num_batches), rounds=1)
    benchmark.extra_info.update({f"ms_{name}": found[name] * 1e3 for name in ("p20", "p50", "p80")})
    benchmark.extra_info.update(
        {name: found[name] for name in ("clips_per_s", "core_ms_per_clip") if name in found}, rounds=num_batches
    )
