"""Memory of the loader over many clips: that of the training process and of every decoding process, at ten moments.

    python -m benchmarks.soak_loader --clips 20000 --backend pyav

100 small files (30 to 79 frames of 160 x 120; H.264, or VP9 for DALI, which decodes no H.264 on the CPU) stand in the
manifest under 2,000 names, so that tables that grow with the number of files would show; one name in fifty is an empty
file. Clips of 8 frames and 64 px, 16 a step. Memory is that of /proc/<pid>/status: VmRSS is what is resident, RssAnon
what of it is a process's own and no part of a file. A decoding process starts as a copy of the training process, and
shares with it what neither has written to since.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from vjepa_fast.common import markdown
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.loader import build_loader

_NUM_FILES, _NUM_NAMES, _BATCH = 100, 2000, 16


def make_videos(folder: Path, codec: str) -> Path:
    """The manifest."""
    suffix = ".webm" if codec == "libvpx-vp9" else ".mp4"
    options = {"g": "12"} | ({"deadline": "realtime", "cpu-used": "8"} if suffix == ".webm" else {"preset": "veryfast"})
    (folder / "empty").touch()
    names = []
    for number in range(_NUM_FILES):
        path = folder / f"source{number}{suffix}"
        base = np.random.default_rng(number).integers(0, 255, (15, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=24, options=options)
            stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
            stream.codec_context.thread_count = 1
            for moment in range(30 + number % 50):
                picture = av.VideoFrame.from_ndarray(np.roll(base, 2 * moment, axis=1), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        names.append(path)
    lines = []
    for number in range(_NUM_NAMES):
        path = folder / f"{number}{suffix}"
        os.link(folder / "empty" if number % 50 == 7 else names[number % _NUM_FILES], path)
        lines.append(f"{path} {number}\n")
    (folder / "list.csv").write_text("".join(lines))
    return folder / "list.csv"


def memory(pid: int) -> tuple[float, float]:
    """VmRSS and RssAnon of a process, MB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            found[name] = int(value.split()[0]) / 1e3
    return found["VmRSS"], found["RssAnon"]


def soak(manifest: Path, backend: str, num_clips: int, num_workers: int, num_points: int = 10) -> list[list[float]]:
    """Rows: clips so far, then VmRSS and RssAnon of the training process and of each decoding process, open files."""
    cfg = DataConfig(
        datasets=[str(manifest)],
        batch_size=_BATCH,
        dataset_fpcs=[8],
        crop_size=64,
        fps=8.0,
        num_workers=num_workers,
        backend=backend,
        cache_dir=manifest.parent / "cache",
    )
    num_steps = num_clips // _BATCH
    # The first is after the queues have filled.
    points = {max(20, num_steps * part // num_points) if part else 20 for part in range(num_points + 1)}
    rows = []
    # Without an end, so that the decoding processes are there to the last.
    with build_loader(cfg) as loader:
        for done, batch in zip(range(1, num_steps + 1), loader, strict=False):
            assert batch.clips[0].shape == (_BATCH, 8, 64, 64, 3)
            if done in points:
                processes = [os.getpid(), *loader.worker_pids()]
                figures = [figure for pid in processes for figure in memory(pid)]
                rows.append([done * _BATCH, *figures, len(os.listdir("/proc/self/fd"))])
    return rows


def as_markdown(rows: list[list[float]]) -> str:
    """A table; megabytes."""
    names = ["training process", *(f"decoding process {number}" for number in range((len(rows[0]) - 4) // 2))]
    columns = [column for name in names for column in (f"{name}: resident", "own")]
    texts = [[f"{value:.0f}" for value in row] for row in rows]
    return "\n".join(markdown.table(["clips", *columns, "open files"], texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--backend", choices=["pyav", "dali"], default="pyav")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        codec = "libvpx-vp9" if arguments.backend == "dali" else "libx264"
        manifest = make_videos(Path(folder), codec)
        began = time.perf_counter()
        rows = soak(manifest, arguments.backend, arguments.clips, arguments.workers)
        print(as_markdown(rows))
        print(f"\n{arguments.backend}, {arguments.workers} decoding processes, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
