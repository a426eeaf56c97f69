"""Measures what the loader delivers from a user's files and from packs, per back end, and whether it feeds the step.

Every row is measured twice: in this process, whose CPU time is known exactly, and with the decoding processes that
training has, for the rate. Neither counts importing, starting processes, building pipelines, or the keyframe indices of
videos, which are read once and kept. What was read before comes from the memory of the machine, not from its disk.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import vjepa_fast as vf
from vjepa_fast.bench.sample import Sample, open_sample, pack_sample
from vjepa_fast.bench.timing import Quantiles
from vjepa_fast.common.cache_dir import default_cache_dir
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode import dali
from vjepa_fast.data.pack.reader import Pack, is_pack
from vjepa_fast.data.workers import auto_num_workers, available_cores

# In this process a clip costs the same in a batch of any size: small ones end sooner.
_MAX_BATCH_IN_PROCESS = 8
_MIN_CLIPS_IN_PROCESS = 32
_NUM_SHOWN = 5
_BACKENDS = {"pyav": "PyAV", "dali": "DALI"}


def measure_loader(
    manifest: str,
    pack: str | None,
    cfg: DataConfig,
    device: torch.device,
    num_batches: int = 8,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All rows: videos and packs, by PyAV and DALI, as far as they can serve here.

    Args:
        manifest: CSV, .npy, folder or glob of videos, or a pack.
        pack: a pack of the videos; None: some of them are packed for the measurement, in the cache folder, and the
            pack is deleted afterwards.
        cfg: how training reads clips; its datasets do not matter.
        device: where the clips go.
        num_batches: timed batches of each row, at least.
        report: is told how it goes, line by line.

    Returns:
        `sample` of the videos, `pack` (what was made, where one was), and `rows`: `format` (videos or pack), `backend`,
        and the figures of read_both, or `error`.

    Raises:
        UserError: the manifest or pack cannot be used.
    """
    out: dict[str, Any] = {"rows": []}
    packs = [name for name in (pack, manifest) if name is not None and is_pack(name)]
    if pack is not None and not is_pack(pack):
        raise UserError(f"--pack {pack} is no pack; expected a folder that `vjepa-fast pack` made")
    for name in packs:
        Pack(name, cfg.cache_dir).check_fps(cfg.fps)
    with _temporary_folder(cfg.cache_dir or default_cache_dir()) as folder:
        sources = {}
        if not is_pack(manifest):
            sample = open_sample(manifest, cfg)
            out["sample"] = sample.as_dict()
            for line in _left_out(sample):
                report(line)
            if len(sample.paths) < cfg.per_process(1):
                report(
                    f"{len(sample.paths)} videos are fewer than the {cfg.per_process(1)} clips of a batch: they are "
                    "read again and again"
                )
            sources["videos"] = sample.write(folder / "sample.npy")
        if packs:
            sources["pack"] = packs[0]
        else:
            report("packing some of the videos for the measurement")
            try:
                out["pack"] = pack_sample(sample, folder / "pack", cfg)
                sources["pack"] = str(folder / "pack")
            except UserError as error:
                out["rows"].append({"format": "pack", "backend": "none", "error": str(error).splitlines()[0]})
        for row in _rows(sources, cfg, device, num_batches):
            report(describe(row))
            out["rows"].append(row)
    return out


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="bench-", dir=parent)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {parent} ({error.strerror or error}); set XDG_CACHE_HOME to another one"
        ) from None
    with folder as name:
        yield Path(name)


def _left_out(sample: Sample) -> list[str]:
    if not sample.broken:
        return []
    more = len(sample.broken) - _NUM_SHOWN
    tried = len(sample.paths) + len(sample.broken)
    return [
        f"{len(sample.broken)} of the {tried} videos that were tried cannot be read and are left out:",
        *(f"  {path}: {reason}" for path, reason in sample.broken[:_NUM_SHOWN]),
        *([f"  ... and {more} more"] if more > 0 else []),
    ]


def _rows(sources: dict[str, str], cfg: DataConfig, device: torch.device, num_batches: int) -> Iterator[dict[str, Any]]:
    for kind, name in sources.items():
        for backend in _BACKENDS:
            row = {"format": kind, "backend": backend}
            why_not = dali.missing(device) if backend == "dali" else None
            # What cannot be decoded is replaced, and listed with the row.
            chosen = cfg.model_copy(
                update={
                    "datasets": [name],
                    "dataset_fpcs": cfg.dataset_fpcs[:1],
                    "datasets_weights": None,
                    "backend": backend,
                    "max_broken": 1.0,
                }
            )
            try:
                if why_not is not None:
                    raise UserError(why_not)
                yield row | read_both(chosen, device, num_batches)
            except UserError as error:
                # A result may be published: where things lie on this machine is nobody's business.
                yield row | {"error": str(error).splitlines()[0].replace(name, kind)}


def backend_name(row: dict[str, Any]) -> str:
    """For people; a row without a back end failed before there was one."""
    return _BACKENDS.get(row["backend"], "any back end")


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    what = f"{row['format']}, {backend_name(row)}"
    if "error" in row:
        return f"{what}: {row['error']}"
    notes = f" ({'; '.join(row['notes'])})" if row["notes"] else ""
    processes = "process" if row["num_workers"] == 1 else "processes"
    return (
        f"{what}: {row['clips_per_s']:.1f} clips/s with {row['num_workers']} decoding {processes}, "
        f"{row['core_ms_per_clip']:.1f} core-ms a clip{notes}"
    )


def read_both(cfg: DataConfig, device: torch.device, num_batches: int) -> dict[str, Any]:
    """One row: clips_per_s, num_workers and quantiles of a batch's seconds as training has them, core_ms_per_clip, and
    notes: what was decoded by another back end, what was replaced."""
    workers = cfg.num_workers if cfg.num_workers is not None else auto_num_workers(device)
    small = min(cfg.per_process(1), _MAX_BATCH_IN_PROCESS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        alone = read_batches(
            cfg.model_copy(update={"num_workers": 0, "batch_size": small, "global_batch_size": None}),
            device,
            max(num_batches, -(-_MIN_CLIPS_IN_PROCESS // small)),
        )
        # Batches come in bursts, one a process.
        found = (
            alone
            if workers == 0 and small == cfg.per_process(1)
            else read_batches(cfg.model_copy(update={"num_workers": workers}), device, max(num_batches, 2 * workers))
        )
    notes: dict[str, None] = {}
    for one in said:
        if "DALI does not decode" in str(one.message):
            notes[str(one.message)] = None
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    notes |= dict.fromkeys(alone["replaced"] + found["replaced"])
    return {**found, "core_ms_per_clip": alone["core_ms_per_clip"], "notes": list(notes)}


def read_batches(cfg: DataConfig, device: torch.device, num_batches: int) -> dict[str, Any]:
    """Reads batches as training does, with `cfg.num_workers` as it is, and throws them away.

    Returns:
        clips_per_s, num_workers, quantiles of a batch's seconds, `replaced` (reasons), and without workers
        core_ms_per_clip: user and system time of this process, all threads.
    """
    assert cfg.num_workers is not None
    # All that is read ahead is under way when timing begins, and as much when it ends: so the run is without end.
    warmup = 2 + cfg.prefetch * cfg.num_workers + (cfg.device_prefetch or (4 if device.type == "cuda" else 2))
    with vf.build_loader(cfg, device=device) as loader:
        batches: Iterator[Any] = iter(loader)
        for _ in range(warmup):
            next(batches)
        seconds, cpu = [], time.process_time()
        for _ in range(num_batches):
            began = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
        replaced = [f"replaced: {video.reason}" for video in loader.broken()]
    clips = cfg.per_process(1) * num_batches
    # With workers batches come in bursts: the rate is over all of them.
    out: dict[str, Any] = asdict(Quantiles.of(seconds)) | {
        "clips_per_s": clips / sum(seconds),
        "num_workers": cfg.num_workers,
        "replaced": replaced,
    }
    if cfg.num_workers == 0:
        out["core_ms_per_clip"] = cpu * 1e3 / clips
    return out


def add_need(loader: dict[str, Any], step_clips_per_s: float, device: torch.device) -> None:
    """Says what the step would need, and how much of the time each row would have it wait.

    On a GPU the loader works beside the step, which waits for what the loader lacks: max(0, 1 - has / needs). On a CPU
    both take turns on the same cores: the loader's share of their time.

    Args:
        loader: from measure_loader; gets `step_clips_per_s` and `step_ms_per_clip`, each row `waits`, a fraction.
        step_clips_per_s: of the step with its clips at hand.
        device: of the step.
    """
    step_ms = 1e3 / step_clips_per_s
    loader |= {"step_clips_per_s": step_clips_per_s, "step_ms_per_clip": step_ms}
    for row in loader["rows"]:
        if "error" in row:
            continue
        if device.type == "cuda":
            row["waits"] = max(0.0, 1 - row["clips_per_s"] / step_clips_per_s)
        else:
            own_ms = row["core_ms_per_clip"] / available_cores()
            row["waits"] = own_ms / (own_ms + step_ms)


def describe_need(loader: dict[str, Any], device: torch.device) -> list[str]:
    """What add_need found, as lines of text."""
    lines = [
        f"the step takes {loader['step_ms_per_clip']:.1f} ms a clip here, so it needs "
        f"{loader['step_clips_per_s']:.1f} clips/s"
    ]
    for row in loader["rows"]:
        if "waits" in row:
            share = f"{100 * row['waits']:.1f} %"
            lines.append(
                f"{row['format']}, {backend_name(row)}: has {row['clips_per_s']:.1f} clips/s, "
                + (
                    f"the step would wait {share} of the time"
                    if device.type == "cuda"
                    else f"on the same cores decoding would take {share} of the time"
                )
            )
    return lines
