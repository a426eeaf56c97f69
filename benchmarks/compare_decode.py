"""Core-milliseconds of a clip: the reference's way beside ours, raw and from a pack; which damage nobody can tell.

    python -m benchmarks.compare_decode --folder /tmp/videos

16 frames of a random window of 112, cropped at random, to 256 px, from videos made for it (benchmarks/clip_sources.py):
a panning texture, moving discs and noise. User and system time of this process (getrusage), one thread, lowest of nine
rounds of ten clips, the ways in turns. Importing, building pipelines and indices are not in it. DALI's columns need the
extra `dali`.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clip_sources import KINDS, Kind, pack_of, requests, write_video
from vjepa_fast.bench.timing import ROOT, environment
from vjepa_fast.common import markdown
from vjepa_fast.data.decode import dali
from vjepa_fast.data.decode.backend import HostPreparer
from vjepa_fast.data.decode.dali import DaliPreparer
from vjepa_fast.data.decode.dali_pipelines import DaliFinisher
from vjepa_fast.data.decode.index import DecodeError, build_index
from vjepa_fast.data.decode.pyav import decode_clip, decode_each, decode_frames, resize_clip
from vjepa_fast.data.decode.request import ClipRequest, VideoSource

_SIZE, _NUM_CLIPS, _NUM_ROUNDS = (256, 256), 10, 9
_CPU = torch.device("cpu")
_MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
_STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
_COLUMNS = ["reference", "PyAV raw", "by RGB frames", "decoding alone", "DALI raw", "PyAV pack", "DALI pack"]

Way = Callable[[], object]


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
    clip = clip[:, :, top : top + height, left : left + width]
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


class ByDali:
    """A batch as the loader decodes it, with one pipeline of one thread."""

    def __init__(self) -> None:
        self._preparer = DaliPreparer(on_gpu=False)
        self._finisher = DaliFinisher(_CPU, _SIZE, _NUM_CLIPS, 1, 1, False)

    def __call__(self, clips: list[ClipRequest]) -> Tensor:
        batch = self._preparer.collate([self._preparer.prepare(clip) for clip in clips])
        finished = self._finisher.wait(self._finisher.start(batch))
        assert not finished.failed
        return finished.clips


def core_ms() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (usage.ru_utime + usage.ru_stime)


def in_turns(ways: dict[str, Way]) -> dict[str, list[float]]:
    """Core-milliseconds of every way, round by round, behind one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_NUM_ROUNDS + 1):
        for name, way in ways.items():
            before = core_ms()
            way()
            if number:
                found[name].append(core_ms() - before)
    return found


def costs(kind: Kind, folder: Path, with_dali: bool) -> dict[str, Any]:
    """What a clip of one kind of video costs, by every way that can read it."""
    paths = kind.write(folder)
    before = core_ms()
    indices = [build_index(str(path)) for path in paths]
    index_ms = (core_ms() - before) / len(paths)
    raw = requests(
        [VideoSource(str(path), index) for path, index in zip(paths, indices, strict=True)], _NUM_CLIPS, _SIZE
    )
    pack, made = pack_of(paths, folder / f"{kind.name} pack".replace(" ", "_"))
    packed = requests([pack.open(number) for number in range(len(pack))], _NUM_CLIPS, _SIZE)
    host = HostPreparer()

    def each(way: Callable[[ClipRequest], object], clips: list[ClipRequest]) -> Way:
        return lambda: [way(clip) for clip in clips]

    ways = {
        "reference": each(reference_way, raw),
        "PyAV raw": each(host.prepare, raw),
        "by RGB frames": each(by_swscale, raw),
        "decoding alone": each(decode_only, raw),
        "PyAV pack": each(host.prepare, packed),
    }
    if with_dali:
        by_dali = ByDali()
        ways["DALI pack"] = lambda: by_dali(packed)
        if kind.codec == "libvpx-vp9":
            ways["DALI raw"] = lambda: by_dali(raw)
        assert torch.equal(by_dali(packed), host.collate([host.prepare(clip) for clip in packed]))
    rounds = {name: [value / _NUM_CLIPS for value in values] for name, values in in_turns(ways).items()}
    difference = torch.stack([decode_clip(clip).float() - by_swscale(clip).float() for clip in raw[:4]])
    return {
        "source": kind.name,
        "core_ms": {name: min(values) for name, values in rounds.items()},
        "rounds": rounds,
        "index_ms": index_ms,
        "video_bytes": sum(path.stat().st_size for path in paths) / len(paths),
        "pack_bytes": made.num_bytes / made.num_videos,
        "pack_psnr": made.psnr,
        "pack_size": [packed[0].source.height, packed[0].source.width],
        "colour": {
            "mean": float(difference.mean()),
            "size": float(difference.abs().mean()),
            "most": float(difference.abs().max()),
        },
    }


def bit_flips(folder: Path, num_files: int = 60) -> list[list[Any]]:
    """All frames of files in which some bits were flipped at random places: codec, bits, and files by outcome."""
    rows: list[list[Any]] = []
    encoders: dict[str, dict[str, Any]] = {
        "h264": {"codec": "libx264", "bf": "2", "g": "48", "preset": "veryfast"},
        "hevc": {"codec": "libx265", "preset": "ultrafast", "x265-params": "keyint=48:log-level=none:pools=1"},
        "vp9": {"codec": "libvpx-vp9", "g": "48", "deadline": "realtime", "cpu-used": "8"},
    }
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
            rows.append([name, num_bits, *outcomes])
    return rows


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about, rows = report["environment"], report["rows"]
    changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
    lines = [
        "# What a clip costs, raw and from a pack, beside the reference's way, CPU",
        "",
        f"- hardware: {about['cpu']}, {about['cores']} cores, 1 thread used; load average "
        f"{about['load_average']:.2f} before",
        f"- versions: python {about['python']}, torch {about['torch']}, PyAV {about['av']}, Pillow {about['pillow']}, "
        f"DALI {about['dali'] or 'not installed'}, vjepa_fast {about['vjepa_fast']}, commit {about['commit']}{changed}",
        f"- command: `{about['command']}`",
        f"- date: {about['date']}",
        "",
        "Core-milliseconds (user and system, getrusage) a clip of 16 frames from a window of 112, cropped, 256 px;",
        f"lowest of {_NUM_ROUNDS} rounds of {_NUM_CLIPS} clips. Sources: ten seconds of 30 frames a second; H.264 by "
        "x264 medium, crf 28.",
        "*reference*: PyAV decodes every frame from the keyframe on, whole RGB frames by swscale, crop, resize and",
        "normalisation in fp32. *by RGB frames*: our decoding, swscale, then PyTorch's resize of uint8. *pack*: of",
        "`vjepa-fast pack` as it is by default (4 frames/s, shorter side 256, nothing enlarged, quality 90), reading",
        "included; both back ends give the same bytes. *index*: once a file. Other work on the machine raises the",
        "figures of a row together, those of one row more than of another: compare within a row.",
        "",
        *markdown.table(
            ["source", *_COLUMNS, "index"],
            [
                [
                    row["source"],
                    *(f"{row['core_ms'][name]:.1f}" if name in row["core_ms"] else "" for name in _COLUMNS),
                    f"{row['index_ms']:.1f}",
                ]
                for row in rows
            ],
        ),
    ]
    lines += ["", "Reference's cost over ours:", "", *_over_ours(rows)]
    lines += ["", "Colour, PyAV raw less that by RGB frames:", ""]
    lines += [
        f"- {row['source']}: {row['colour']['mean']:.2f} on average, {row['colour']['size']:.2f} in size, "
        f"{row['colour']['most']:.0f} at most"
        for row in rows
    ]
    lines += [
        "",
        "Against the formula in real numbers PyAV raw is at most 0.6 off (tests/ops/test_clip_pixels.py):",
        "the rest is FFmpeg's, which cuts fractions off and repeats chroma.",
    ]
    lines += [
        "",
        "Damage: all 96 frames of 60 files of 128 x 96 were read, in which that many bits were flipped at",
        "random places. The columns count files; those of the fourth have frames that are wrong and no word of",
        "it from container or decoder.",
        "",
        *markdown.table(
            ["codec", "bits flipped", "a reason is given", "wrong frames without one", "no frame is wrong"],
            report["damage"],
        ),
    ]
    return "\n".join(lines) + "\n"


def _over_ours(rows: list[dict[str, Any]]) -> list[str]:
    ours = [name for name in _COLUMNS if name not in ("reference", "by RGB frames", "decoding alone")]
    compared = []
    for row in rows:
        found = row["core_ms"]
        ratios = [f"{found['reference'] / found[name]:.1f}" if name in found else "" for name in ours]
        height, width = row["pack_size"]
        sizes = [f"{width} x {height}", f"{row['video_bytes'] / 1e3:.0f}", f"{row['pack_bytes'] / 1e3:.0f}"]
        compared.append([row["source"], *ratios, *sizes, f"{row['pack_psnr']:.1f}"])
    head = ["source", *ours, "packed frame", "video, KB", "pack, KB", "PSNR, dB"]
    return markdown.table(head, compared)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where videos and packs are made, new or of this")
    parser.add_argument("--out", type=Path, help="without extension; default: in benchmarks/results, with the date")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    torch.set_num_threads(1)
    with_dali = dali.missing(_CPU) is None
    about = environment(_CPU) | {"av": av.__version__, "pillow": PIL.__version__, "dali": None}
    if with_dali:
        import nvidia.dali

        about["dali"] = nvidia.dali.__version__
    about["command"] = about["command"].replace(str(folder), "FOLDER")
    rows = []
    for kind in KINDS:
        rows.append(costs(kind, folder, with_dali))
        print(kind.name, {name: round(value, 1) for name, value in rows[-1]["core_ms"].items()}, flush=True)
    report = {"environment": about, "rows": rows, "damage": bit_flips(folder)}
    out = arguments.out or ROOT / "benchmarks" / "results" / f"clips_cpu_{about['date'][:10]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
