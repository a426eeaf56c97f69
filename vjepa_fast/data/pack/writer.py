"""Makes packs in parallel and resumes unfinished ones.

Workers turn one video each into a part; this process joins the parts, in the order of the manifest, to shards. So what
a shard holds depends neither on the number of workers nor on how often the work was interrupted. A part is written once
and copied once, which is nothing beside decoding it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vjepa_fast.common.atomic import atomic_path, disk_errors, write_text
from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.pack.encode import encode_video
from vjepa_fast.data.pack.index import INDEX_NAME, PackedFrames, PackSettings, encode_index, read_index
from vjepa_fast.data.pack.state import ADVICE, Part, ShardAssembler, State, check_same
from vjepa_fast.data.path_list import PathList
from vjepa_fast.data.pool import Failed, Pool

BROKEN_NAME = "broken.tsv"
_MIN_TRIED = 20
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Summary:
    """What a pack came to, over all attempts at it.

    Attributes:
        num_videos, num_broken: packed, and left out.
        num_frames, num_shards, num_bytes: of the pack; bytes of its shards and index.
        source_bytes: of the videos that are packed.
        psnr: dB, of the sampled frames against what was compressed, over RGB; None where the pack was there already.
        num_sampled: frames sampled.
        core_ms: core-milliseconds a video; None where the pack was there already.
        seconds: of this attempt.
    """

    num_videos: int
    num_broken: int
    num_frames: int
    num_shards: int
    num_bytes: int
    source_bytes: int | None
    psnr: float | None
    num_sampled: int
    core_ms: float | None
    seconds: float


@dataclass
class Counts:
    """How far it is, for a progress bar."""

    total: int
    done: int = 0
    broken: int = 0
    num_bytes: int = 0
    source_bytes: int = 0


@dataclass
class _Encoder:
    """What a worker does with a video."""

    state: State
    paths: PathList
    labels: Sequence[Any]
    settings: PackSettings

    def __call__(self, number: int) -> Part:
        path, target = self.paths[number], self.state.part_file(number)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        began = time.process_time()
        part = Part(number, None)
        with disk_errors(self.state.folder, "pack", ADVICE):
            try:
                with temporary.open("wb") as out:
                    part.encoded = encode_video(path, self.labels[number], f"{number:08d}", self.settings, out)
                data = temporary.read_bytes()
                part.part_bytes, part.part_crc = len(data), zlib.crc32(data)
                part.source_bytes = os.path.getsize(path)
                os.replace(temporary, target)
            except DecodeError as error:
                part.reason = str(error)
            finally:
                temporary.unlink(missing_ok=True)
            part.cpu_ms = (time.process_time() - began) * 1e3
            self.state.write_part(part)
        return part


def make_pack(
    paths: Sequence[str],
    labels: Sequence[Any],
    folder: Path,
    settings: PackSettings,
    *,
    num_workers: int,
    max_broken: float = 0.1,
    report: Callable[[Counts], None] = lambda counts: None,
) -> Summary:
    """Packs the videos of a manifest, or goes on with it.

    Args:
        paths, labels: from vjepa_fast.data.manifest.read_manifest.
        folder: of the pack.
        settings: of the pack.
        num_workers: processes that decode.
        max_broken: stop when more than this fraction of the videos tried cannot be packed.
        report: called after every video.

    Raises:
        UserError: too many videos are broken, the disk is full, or the folder holds another pack. The same command
            goes on with what is done.
    """
    began = time.perf_counter()
    digest = hashlib.sha256(json.dumps([list(paths), list(labels)]).encode()).hexdigest()
    about = asdict(settings) | {"videos": len(paths), "manifest": digest[:16]}
    state = State(folder)
    if (folder / INDEX_NAME).exists():
        return _finished(state, about, began)
    state.begin(about)
    with disk_errors(folder, "pack", ADVICE), state.lock():
        if (folder / INDEX_NAME).exists():
            # Another command was faster.
            return _finished(state, about, began)
        waiting = state.load()
        counts = Counts(len(paths))
        broken: list[Part] = []

        def count(part: Part) -> None:
            counts.done += 1
            counts.num_bytes += part.part_bytes
            counts.source_bytes += part.source_bytes
            if part.reason is not None:
                broken.append(part)
                counts.broken += 1

        for part in [*(part for shard in state.shards for part in shard.parts), *waiting.values()]:
            count(part)
        report(counts)
        todo = [number for number in range(state.num_sharded, len(paths)) if number not in waiting]
        assembler = ShardAssembler(state, settings.shard_bytes, waiting)
        assembler.add()
        try:
            encoder = _Encoder(state, PathList(paths), labels, settings)
            with Pool(encoder, min(num_workers, len(todo))) as pool:
                for number, result in pool.run(todo):
                    part = Part(number, str(result)) if isinstance(result, Failed) else result
                    count(part)
                    assembler.add(part)
                    report(counts)
                    if counts.done >= min(_MIN_TRIED, counts.total) and counts.broken > max_broken * counts.done:
                        raise _too_many(broken, counts.done, max_broken, paths)
            if counts.broken == counts.total:
                raise _too_many(broken, counts.done, max_broken, paths)
            last = assembler.finish()
        finally:
            assembler.abandon()
        return _finish(state, settings, about, last, paths, labels, began)


def _finished(state: State, about: dict[str, Any], began: float) -> Summary:
    """Summary of a finished pack."""
    file = state.folder / INDEX_NAME
    index = read_index(file, str(state.folder))
    check_same(state.folder, asdict(index.settings) | json.loads(index.manifest), about)
    state.remove()
    return Summary(
        len(index),
        about["videos"] - len(index),
        len(index.frame_bytes),
        len(index.shard_bytes),
        int(index.shard_bytes.sum()) + file.stat().st_size,
        None,
        None,
        0,
        None,
        time.perf_counter() - began,
    )


def _finish(
    state: State,
    settings: PackSettings,
    about: dict[str, Any],
    last: list[Part],
    paths: Sequence[str],
    labels: Sequence[Any],
    began: float,
) -> Summary:
    shards = []
    for shard in state.shards:
        offset, videos = 0, []
        for part in shard.parts:
            if part.encoded is not None:
                one = part.encoded
                videos.append(
                    PackedFrames(part.number, one.height, one.width, one.fps, one.phases, one.sizes, one.crcs, offset)
                )
                offset += part.part_bytes
        shards.append((shard.num_bytes, videos))
    parts = [part for shard in state.shards for part in shard.parts] + last
    packed = [part for part in parts if part.encoded is not None]
    broken = [part for part in parts if part.encoded is None]
    if broken:
        buffer = io.StringIO()
        rows = [(paths[part.number], part.reason) for part in broken]
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([("path", "reason"), *rows])
        write_text(state.folder / BROKEN_NAME, buffer.getvalue())
    manifest = json.dumps({name: about[name] for name in ("videos", "manifest")})
    data = encode_index(settings, manifest, shards, paths, labels)
    with atomic_path(state.folder / INDEX_NAME) as temporary:
        temporary.write_bytes(data)
    state.remove()
    sampled = sum(part.encoded.num_sampled for part in packed if part.encoded)
    error = sum(part.encoded.squared_error for part in packed if part.encoded) / sampled
    return Summary(
        len(packed),
        len(broken),
        sum(len(part.encoded.sizes) for part in packed if part.encoded),
        len(shards),
        sum(size for size, _ in shards) + len(data),
        sum(part.source_bytes for part in packed),
        10 * math.log10(255**2 / error) if error else math.inf,
        sampled,
        sum(part.cpu_ms for part in parts) / len(packed),
        time.perf_counter() - began,
    )


def _too_many(broken: list[Part], num_tried: int, max_broken: float, paths: Sequence[str]) -> UserError:
    lines = [f"  {paths[part.number]}: {part.reason}" for part in broken[:_NUM_SHOWN]]
    if len(broken) > _NUM_SHOWN:
        lines.append(f"  ... and {len(broken) - _NUM_SHOWN} more")
    return UserError(
        f"more than --max-broken {max_broken:g} of the videos cannot be packed, {len(broken)} of the {num_tried} "
        f"tried; what is done is kept, and {ADVICE}:\n" + "\n".join(lines)
    )
