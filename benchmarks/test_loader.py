"""Clips from video files: decode, crop, resize, flip, collate. What it costs in core-milliseconds a clip.

The files are the demo's own kind of video at the size of a raw dataset: 256 px, 30 frames a second, 4 of them read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.bench.timing import Quantiles
from vjepa_fast.bench.workload import TRIAL, Workload
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.synthetic import make_synthetic
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
        datasets=[str(videos)], dataset_fpcs=[workload.num_frames], batch_size=_BATCH, fps=4,
        crop_size=workload.config.data.crop_size, num_workers=num_workers, cache_dir=videos.parent / "cache")
    num_batches = 2 if workload is TRIAL else 8
    # Batches that the workers have read ahead when timing begins would count as free.
    warmup = 2 + cfg.prefetch * num_workers
    with vf.build_loader(cfg, device=device, num_steps=warmup + num_batches + 5) as loader:
        batches: Iterator[Any] = iter(loader)
        for _ in range(warmup):
            next(batches)
        benchmark.extra_info.update(workload=workload.name, device="cpu", num_workers=num_workers)
        if benchmark.disabled:
            benchmark(lambda: next(batches))
            return
        seconds, cpu = [], time.process_time()
        for _ in range(num_batches):
            began = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
        # One batch is as good as another, but with workers they come in bursts: the rate is over all of them.
        found = Quantiles.of(seconds)
        benchmark.extra_info.update(
            ms_p20=found.p20 * 1e3, ms_p50=found.p50 * 1e3, ms_p80=found.p80 * 1e3, rounds=num_batches,
            clips_per_s=_BATCH * num_batches / sum(seconds))
        if num_workers == 0:
            benchmark.extra_info["core_ms_per_clip"] = cpu * 1e3 / (_BATCH * num_batches)
        benchmark.pedantic(lambda: next(batches), rounds=5)
