"""Draws a sample of a user's videos, and packs some of it, to measure the loader on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import sampling
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.request import Source, open_source
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.pack.encode import packed_size
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.writer import make_pack
from vjepa_fast.data.workers import available_cores

_MAX_VIDEOS = 256
_OPEN_SECONDS = 10.0
# Decoding, scaling and compressing 4 frames/s of 640 x 360 on one core, pixels of the source a second.
_PIXELS_PER_CORE_SECOND = 150e6
_PACK_SECONDS = 20.0
_PACK_BYTES = 256e6
_MAX_PACKED = 64
# At quality 90, of noisy pictures.
_BYTES_PER_PIXEL = 0.5
_SIDE_MULTIPLE = 32
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """Videos that can be opened, with what is known of them.

    Attributes:
        paths: of the videos.
        sources: as opened; their indices are in the cache from now on.
        num_listed: videos of the manifest.
        broken: path and reason of those that were tried and cannot be opened.
    """

    paths: list[str]
    sources: list[Source]
    num_listed: int
    broken: list[tuple[str, str]]

    def write(self, file: Path) -> str:
        """A manifest of these videos, as an .npy; returns its name."""
        np.save(file, np.array(self.paths, dtype=str))
        return str(file)

    def as_dict(self) -> dict[str, int]:
        """What a result says about it: nothing of where files lie."""
        return {
            "num_listed": self.num_listed,
            "num_tried": len(self.paths) + len(self.broken),
            "num_used": len(self.paths),
            "num_broken": len(self.broken),
        }


def open_sample(manifest: str, cfg: DataConfig) -> Sample:
    """Opens some videos of a manifest, chosen at random, so that no index has to be built while figures are taken.

    Args:
        manifest: CSV, .npy, folder or glob.
        cfg: says where indices are kept.

    Raises:
        UserError: it cannot be read, or none of its videos can be opened.
    """
    listed, _ = read_manifest(manifest)
    paths: list[str] = []
    sources: list[Source] = []
    broken: list[tuple[str, str]] = []
    until = time.monotonic() + _OPEN_SECONDS
    for number in sampling.permute(np.arange(min(len(listed), _MAX_VIDEOS)), len(listed), cfg.seed, 0).tolist():
        if paths and time.monotonic() > until:
            break
        try:
            sources.append(open_source(listed[number], cfg.cache_dir))
            paths.append(listed[number])
        except DecodeError as error:
            broken.append((listed[number], str(error)))
    if not paths:
        lines = [f"  {path}: {reason}" for path, reason in broken[:_NUM_SHOWN]]
        raise UserError(
            f"none of the {len(broken)} videos of {manifest!r} that were tried can be read:\n" + "\n".join(lines)
        )
    return Sample(paths, sources, len(listed), broken)


def pack_sample(sample: Sample, folder: Path, cfg: DataConfig) -> dict[str, Any]:
    """Packs as many of the videos as about 20 seconds and 256 MB allow, with what `vjepa-fast pack` does by default.

    Args:
        sample: its first videos are taken; those that would take too long by themselves are passed over.
        folder: of the pack.
        cfg: rate and size of the clips.

    Returns:
        What a result says about the pack: settings, videos, bytes, PSNR.

    Raises:
        UserError: nothing could be packed, or the disk is full.
    """
    side = -(-max(PackSettings.short_side, *cfg.crop_size) // _SIDE_MULTIPLE) * _SIDE_MULTIPLE
    settings = PackSettings(fps=cfg.fps or PackSettings.fps, short_side=side)
    chosen = _affordable(sample.sources, settings, available_cores())
    if not chosen:
        raise UserError(
            f"every video takes more than {_PACK_SECONDS:.0f} s to pack; --pack names a pack that is "
            "there, made with `vjepa-fast pack`"
        )
    paths = [sample.paths[number] for number in chosen]
    made = make_pack(paths, [0] * len(paths), folder, settings, num_workers=available_cores(), max_broken=1.0)
    return {
        **asdict(settings),
        "num_videos": made.num_videos,
        "num_broken": made.num_broken,
        "num_frames": made.num_frames,
        "num_bytes": made.num_bytes,
        "source_bytes": made.source_bytes,
        "psnr": made.psnr,
        "core_ms_per_video": made.core_ms,
        "temporary": True,
    }


def _affordable(sources: Sequence[Source], settings: PackSettings, num_cores: int) -> list[int]:
    """Which videos fit the limits of time and space, by an estimate from their sizes and lengths."""
    seconds, num_bytes, chosen = 0.0, 0.0, []
    for number, source in enumerate(sources):
        own_seconds = source.num_frames * source.height * source.width / _PIXELS_PER_CORE_SECOND
        height, width = packed_size(source.height, source.width, settings.short_side)
        kept = source.num_frames * min(1.0, settings.fps / source.avg_fps if source.avg_fps else 1.0)
        own_bytes = kept * height * width * _BYTES_PER_PIXEL
        # One video is decoded by one core.
        if max(own_seconds, (seconds + own_seconds) / num_cores) > _PACK_SECONDS or num_bytes + own_bytes > _PACK_BYTES:
            continue
        seconds, num_bytes = seconds + own_seconds, num_bytes + own_bytes
        chosen.append(number)
        if len(chosen) == _MAX_PACKED:
            break
    return chosen
