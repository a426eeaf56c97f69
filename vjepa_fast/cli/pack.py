"""`vjepa-fast pack`: decodes and scales videos once and stores JPEG frames, which are cheap to read."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vjepa_fast.cli.console import say
from vjepa_fast.cli.options import command
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.common.progress_bar import Bar
from vjepa_fast.config.sections.base import Section

if TYPE_CHECKING:
    from vjepa_fast.data.pack.writer import Counts, Summary

EPILOG = """
Examples:

  vjepa-fast pack videos.csv --out packs/videos

  vjepa-fast pack 'videos/**/*.mp4' --out packs/videos --fps 4 --two-phase --short-side 320

  vjepa-fast train --recipe vitl16-256 data.datasets=packs/videos

After Ctrl-C, kill -9 or a full disk, run the same command to continue where it stopped.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIDE_MULTIPLE = 32


class PackOptions(Section):
    """Which videos, and how they are kept. Each field is an option, with the help that it shows."""

    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST",
            show_default=False,
            help="Videos and images: a CSV, .npy, folder or glob, as for data.datasets. Labels are kept.",
        ),
    ]
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of the pack: new, or of the same command stopped before.", show_default=False
        ),
    ]
    fps: Annotated[
        float,
        typer.Option(
            metavar="F", help="Frames kept a second, the data.fps of training. A slower video keeps all it has."
        ),
    ] = 4.0
    two_phase: Annotated[
        bool,
        typer.Option(
            "--two-phase", help="Keep twice the frames: a clip can start half a period later, at the same fps."
        ),
    ] = False
    short_side: Annotated[
        int,
        typer.Option(
            metavar="PX", help="Shorter side, a multiple of 32; the other is rounded to one. Nothing is enlarged."
        ),
    ] = 256
    quality: Annotated[int, typer.Option(metavar="Q", min=1, max=95, help="Of the JPEG frames, 4:2:0.")] = 90
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a shard, at most: 500MB, 2GB; a video is never split.")
    ] = "1GB"
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes. The pack is the same for any number.", show_default="one a core"
        ),
    ] = None
    max_broken: Annotated[
        float,
        typer.Option(metavar="X", min=0, max=1, help="Stop when more than this fraction of the videos is broken."),
    ] = 0.1


def _run(options: PackOptions) -> None:
    """Keep videos as JPEG frames in WebDataset shards, which training reads at a fraction of the videos' CPU time.

    Every frame of every video is decoded and checked; what is broken is left out and listed in DIR/broken.tsv.
    """
    if options.fps <= 0:
        raise ConfigError(f"--fps is {options.fps:g}; expected a positive number of frames per second")
    side = options.short_side
    if side < _SIDE_MULTIPLE or side % _SIDE_MULTIPLE:
        raise ConfigError(f"--short-side is {side}; expected a multiple of {_SIDE_MULTIPLE}, as in 256")
    shard_bytes = _num_bytes(options.shard_size)
    # Imported here: they need seconds, which --help need not wait for.
    from vjepa_fast.data.manifest import read_manifest
    from vjepa_fast.data.pack.index import PackSettings
    from vjepa_fast.data.pack.reader import is_pack
    from vjepa_fast.data.pack.writer import BROKEN_NAME, make_pack
    from vjepa_fast.data.workers import available_cores

    if is_pack(options.manifest):
        raise UserError(f"{options.manifest} is a pack already; expected videos: a CSV, .npy, folder or glob")
    paths, labels = read_manifest(options.manifest)
    bar: Bar | None = None
    counts: Counts | None = None

    def report(now: Counts) -> None:
        nonlocal bar, counts
        counts, bar = now, bar or Bar("packed", "videos", now.total, now.done)
        bar.show(now.done, f"{now.broken} broken  {_size(now.num_bytes)}")

    try:
        summary = make_pack(
            paths,
            labels,
            options.out,
            PackSettings(options.fps, side, options.quality, options.two_phase, shard_bytes),
            num_workers=options.workers or available_cores(),
            max_broken=options.max_broken,
            report=report,
        )
    except KeyboardInterrupt:
        if bar is not None and counts is not None:
            bar.close()
            say(
                "warning", f"{counts.done} of {counts.total} videos are done and kept; run the same command to continue"
            )
        raise
    finally:
        if bar is not None:
            bar.close()
    if summary.num_broken:
        say("warning", f"{summary.num_broken} of {len(paths)} videos could not be packed: {options.out / BROKEN_NAME}")
    typer.echo(_describe(summary, options.out))
    typer.echo(f"train on it with data.datasets={options.out}")


pack = command(PackOptions, _run)


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip().upper())
    unit = _UNITS.get(match[2] if match and match[2] in _UNITS else f"{match[2]}B") if match else None
    number = int(float(match[1]) * unit) if match and unit else 0
    if number <= 0:
        raise ConfigError(f"--shard-size is {text!r}; expected a number with B, KB, MB, GB or TB, as in 500MB or 2GB")
    return number


def _size(num_bytes: int) -> str:
    for unit in ("TB", "GB", "MB", "KB"):
        if num_bytes >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.3g} {unit}"
    return f"{num_bytes} bytes"


def _describe(summary: Summary, out: Path) -> str:
    source = ""
    if summary.source_bytes:
        source = f", {summary.num_bytes / summary.source_bytes:.2f} of the {_size(summary.source_bytes)} of the videos"
    lines = [
        f"{out}: {summary.num_videos} videos, {summary.num_frames} frames, {summary.num_shards} "
        f"{'shard' if summary.num_shards == 1 else 'shards'}, {_size(summary.num_bytes)}{source}"
    ]
    if summary.psnr is None:
        lines.append("it was finished before; nothing was done")
    else:
        lines.append(
            f"PSNR {summary.psnr:.1f} dB over {summary.num_sampled} frames; {summary.core_ms:.0f} "
            f"core-milliseconds a video; {timedelta(seconds=round(summary.seconds))}"
        )
    return "\n".join(lines)
