"""What the loader gives: clips a second, and core-milliseconds a clip."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

import vjepa_fast as vf
from vjepa_fast.bench.timing import Quantiles
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.workers import auto_num_workers


def measure_loader(cfg: DataConfig, device: torch.device, num_batches: int = 8) -> dict[str, dict[str, Any]]:
    """Reads batches twice: in this process, whose CPU time is known exactly, and with the workers that training has.

    Args:
        cfg: what to read, and how large the batches are.
        device: where the clips go.
        num_batches: timed batches, after those that were read ahead.

    Returns:
        `in process` (with core_ms_per_clip) and `with workers`, each with clips_per_s and quantiles of a batch's
        seconds.
    """
    workers = cfg.num_workers if cfg.num_workers is not None else auto_num_workers(device)
    out = {"in process": read_batches(cfg.model_copy(update={"num_workers": 0}), device, num_batches)}
    if workers > 0:
        out["with workers"] = read_batches(cfg.model_copy(update={"num_workers": workers}), device, num_batches)
    return out


def read_batches(cfg: DataConfig, device: torch.device, num_batches: int) -> dict[str, Any]:
    """As measure_loader, with `cfg.num_workers` as it is."""
    assert cfg.num_workers is not None
    # Batches that the workers have read ahead when timing begins would count as free.
    warmup = 2 + cfg.prefetch * cfg.num_workers + (cfg.device_prefetch or 4)
    with vf.build_loader(cfg, device=device, num_steps=warmup + num_batches) as loader:
        batches: Iterator[Any] = iter(loader)
        for _ in range(warmup):
            next(batches)
        seconds, cpu = [], time.process_time()
        for _ in range(num_batches):
            began = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
    clips = cfg.per_process(1) * num_batches
    # With workers batches come in bursts: the rate is over all of them.
    out: dict[str, Any] = asdict(Quantiles.of(seconds)) | {
        "clips_per_s": clips / sum(seconds), "num_workers": cfg.num_workers}
    if cfg.num_workers == 0:
        out["core_ms_per_clip"] = cpu * 1e3 / clips
    return out
