"""Computes features of many videos into one file, in a job that can be stopped and resumed.

Done videos are kept in a folder beside the file, in parts that are whole or absent; when all are done the parts become
the file and the folder goes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vjepa_fast.checkpoints.open import read_safetensors
from vjepa_fast.common.atomic import atomic_path, disk_errors, write_text
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.data.decode.backend import HostPreparer
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.request import ClipRequest, Source
from vjepa_fast.data.frame_sources import FrameSource, open_entry
from vjepa_fast.data.pool import Failed, Pool
from vjepa_fast.data.sampling import Box, clip_step, window_frames
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.inference.part_files import AGAIN, PartFiles

_SETTINGS_FILE, _BROKEN_FILE = "settings.json", "broken.json"
_CROP_SHARE = 224 / 256
"""Of the short side that is seen, as in the reference's evaluations (evals/hub/preprocessor.py)."""


@dataclass(frozen=True)
class Videos:
    """What there is to embed.

    Attributes:
        paths: each once.
        names: of their features: the paths, with bytes that are no UTF-8 escaped.
        labels: one a path, 0 where the manifest has none.
        places: of each, what it is opened from and its number there.
    """

    paths: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    places: list[tuple[FrameSource, int]] = field(default_factory=list)

    def open(self, number: int) -> Source:
        """Raises DecodeError where a video cannot be used."""
        source, place = self.places[number]
        return source.open(place)

    def file_of(self, number: int) -> tuple[str, str]:
        """See FrameSource."""
        source, place = self.places[number]
        return source.file_of(place)

    def only(self, numbers: Sequence[int]) -> Videos:
        """Some of them."""
        return Videos(
            [self.paths[i] for i in numbers],
            [self.names[i] for i in numbers],
            [self.labels[i] for i in numbers],
            [self.places[i] for i in numbers],
        )


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are seen: `clips` windows of `frames` frames at `fps`, spread evenly, the middle of each
    picture resized to `size` (height, width)."""

    frames: int
    fps: float
    size: tuple[int, int]
    clips: int = 1


@dataclass
class Progress:
    """How far an embed job is."""

    total: int
    done: int = 0
    broken: int = 0


def list_videos(names: Iterable[str], one_label: bool = False) -> Videos:
    """The videos that some arguments stand for: files, folders, globs, CSV or .npy manifests, packs.

    Args:
        names: the arguments.
        one_label: a video that is listed again must have the label that it had; else the first one counts.

    Raises:
        UserError: one of them does not exist or is empty, or a video has two labels.
    """
    found = Videos()
    known: dict[str, Any] = {}
    for name in names:
        source = open_entry(name)
        for place, (path, label) in enumerate(zip(source.paths, source.labels, strict=True)):
            if path in known:
                if one_label and known[path] != label:
                    raise UserError(
                        f"dataset {name!r}: {path} is there twice, with label {known[path]!r} and with "
                        f"{label!r}; expected one label a video"
                    )
                continue
            known[path] = label
            found.paths.append(path)
            found.names.append(path.encode("utf-8", "backslashreplace").decode())
            found.labels.append(label)
            found.places.append((source, place))
    return found


def read_clips(source: Source, sampling: Sampling) -> Tensor:
    """uint8 [clips, T, H, W, 3] of a video; an image is shown throughout.

    Raises:
        DecodeError: it cannot be decoded, or its frame rate is unknown.
    """
    starts = [0] * sampling.clips
    step = 1
    if not source.is_image:
        try:
            step = clip_step(source.avg_fps, sampling.frames, fps=sampling.fps)
        except ValueError as error:
            raise DecodeError("its frame rate is unknown") from error
        spare = max(0, source.num_frames - sampling.frames * step)
        # One clip lies in the middle, several begin at the beginning and end at the end.
        starts = [spare // 2] if sampling.clips == 1 else np.linspace(0, spare, sampling.clips).astype(int).tolist()
    box = middle_box(source.height, source.width, *sampling.size)
    requests = [
        ClipRequest(
            source,
            np.zeros(sampling.frames, dtype=np.int64)
            if source.is_image
            else window_frames(start, source.num_frames, sampling.frames, step),
            box,
            sampling.size,
            False,
        )
        for start in starts
    ]
    return torch.stack(HostPreparer().prepare_together(requests))


def middle_box(height: int, width: int, wanted_height: int, wanted_width: int) -> Box:
    """The part of a picture that is seen: _CROP_SHARE of what fits, of the wanted shape."""
    unit = min(height / wanted_height, width / wanted_width) * _CROP_SHARE
    box_height, box_width = max(1, round(wanted_height * unit)), max(1, round(wanted_width * unit))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


class EmbedJob:
    """Features of some videos, in the end in one file.

    Args:
        videos: from list_videos.
        out: .safetensors, or .npz (bfloat16 becomes float32 there).
        sampling: which frames.
        settings: whatever else the features depend on; a job that goes on must have the same.

    Raises:
        ConfigError: `out` exists, ends otherwise, or its parts are of another job.
    """

    def __init__(self, videos: Videos, out: Path, sampling: Sampling, settings: Mapping[str, Any]) -> None:
        if out.suffix not in (".safetensors", ".npz"):
            raise ConfigError(f"--out is {out}; expected a name that ends in .safetensors or .npz")
        if out.exists():
            raise ConfigError(f"{out} exists; give another --out or remove it")
        self.videos, self.out, self.sampling = videos, out, sampling
        self.folder = out.with_name(f".{out.name}.parts")
        listed = hashlib.sha256("\0".join(videos.names).encode()).hexdigest()
        self.settings = {**settings, **asdict(sampling), "size": list(sampling.size), "videos": listed}
        self.broken: dict[str, str] = {}
        self._parts: list[Path] = []
        self._files = PartFiles(
            lambda: self.folder / f"{len(self._parts):06d}.safetensors", lambda path: self._parts.append(path)
        )
        self._resume()
        self.progress = Progress(len(videos.paths), len(self._done) + len(self.broken), len(self.broken))

    def _resume(self) -> None:
        self._done: set[str] = set()
        settings = self.folder / _SETTINGS_FILE
        if not settings.exists():
            return
        before = json.loads(settings.read_text(encoding="utf-8"))
        for name, value in self.settings.items():
            if before.get(name) != value:
                what = "other videos" if name == "videos" else f"{name}={before.get(name)}, now {value}"
                raise ConfigError(
                    f"an unfinished job for {self.out} had {what}; give what it had to go on, another "
                    f"--out, or remove {self.folder}"
                )
        self._parts = sorted(self.folder.glob("*.safetensors"))
        for part in self._parts:
            self._done |= read_safetensors(part)[0].keys()
        if (self.folder / _BROKEN_FILE).exists():
            self.broken = json.loads((self.folder / _BROKEN_FILE).read_text(encoding="utf-8"))

    def run(
        self,
        model: Callable[[], InferenceModel],
        encode: Callable[[InferenceModel, Tensor], Tensor],
        batch_size: int,
        num_workers: int,
        report: Callable[[Progress], None],
    ) -> Tensor | None:
        """Embed what is left, and write the file.

        Args:
            model: makes the model; called once decoding has begun, and only if there is anything to do.
            encode: features [B, ...] of clips uint8 [B, T, H, W, 3].
            batch_size: clips in one call of it.
            num_workers: decoding processes.
            report: called after every video.

        Returns:
            The features of the first video; None where all are broken, and no file is written.

        Raises:
            UserError: the disk is full, or somebody else has changed the parts.
        """
        left = [
            number
            for number, path in enumerate(self.videos.names)
            if path not in self._done and path not in self.broken
        ]
        with disk_errors(self.out, "", AGAIN):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / _SETTINGS_FILE, json.dumps(self.settings))
        if left:
            try:
                with Pool(self._decode, min(num_workers, len(left))) as pool:
                    self._embed(pool.run(left), model, encode, batch_size, report)
            finally:
                self._files.flush()
        return self._finish()

    def _decode(self, number: int) -> Any:
        torch.set_num_threads(1)
        try:
            return read_clips(self.videos.open(number), self.sampling).numpy()
        except DecodeError as error:
            return Failed(str(error))

    def _embed(
        self,
        results: Iterator[tuple[int, Any]],
        make: Callable[[], InferenceModel],
        encode: Callable[[InferenceModel, Tensor], Tensor],
        batch_size: int,
        report: Callable[[Progress], None],
    ) -> None:
        model = make()
        batch: list[tuple[int, Tensor]] = []
        per_batch = max(1, batch_size // self.sampling.clips)

        def flush() -> None:
            if not batch:
                return
            features = encode(model, torch.cat([clips for _, clips in batch])).cpu()
            for place, (number, _) in enumerate(batch):
                own = features[place * self.sampling.clips : (place + 1) * self.sampling.clips]
                self._files.keep(self.videos.names[number], own[0] if self.sampling.clips == 1 else own)
                self.progress.done += 1
                report(self.progress)
            batch.clear()

        for number, result in results:
            if isinstance(result, Failed):
                self.broken[self.videos.names[number]] = str(result)
                write_text(self.folder / _BROKEN_FILE, json.dumps(self.broken))
                self.progress.done += 1
                self.progress.broken += 1
                report(self.progress)
                continue
            batch.append((number, torch.from_numpy(result)))
            if len(batch) >= per_batch:
                flush()
        flush()

    def _finish(self) -> Tensor | None:
        # Read through the memory map of the parts: no more of them than is being written is in memory.
        features = {key: value for part in self._parts for key, value in read_safetensors(part)[0].items()}
        # In the order of the manifest.
        features = {name: features[name] for name in self.videos.names if name in features}
        lost = [name for name in self.videos.names if name not in features and name not in self.broken]
        if lost:
            raise UserError(
                f"{self.folder} lacks {len(lost)} videos that were done, such as {lost[0]}: another "
                "process writes there too, or parts were deleted. Make sure that no other process does, and "
                f"{AGAIN}"
            )
        first = next(iter(features.values()), None)
        if first is not None:
            with disk_errors(self.out, "features", AGAIN), atomic_path(self.out) as temporary:
                self._write(features, temporary)
            first = first.clone()
        if self.broken:
            lines = [f"{path}\t{reason}\n" for path, reason in self.broken.items()]
            write_text(self.broken_list, "".join(lines))
        shutil.rmtree(self.folder)
        return first

    def _write(self, features: Mapping[str, Tensor], path: Path) -> None:
        if self.out.suffix == ".npz":
            # As np.savez does, one array at a time.
            with zipfile.ZipFile(path, "w") as archive:
                for key, value in features.items():
                    array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array)
            return
        labels = {
            name: label for name, label in zip(self.videos.names, self.videos.labels, strict=True) if name in features
        }
        save_file(dict(features), path, {"settings": json.dumps(self.settings), "labels": json.dumps(labels)})

    @property
    def broken_list(self) -> Path:
        """Where broken videos are listed with the reason."""
        return self.out.with_suffix(".broken.tsv")


def default_sampling(
    model: InferenceModel, frames: int | None, fps: float | None, size: int | None, clips: int
) -> Sampling:
    """What the user says, else what the model was trained on, else 4 frames a second."""
    own_fps = model.data.get("fps")
    assert model.cfg.num_frames is not None and model.cfg.crop_size is not None
    pixels = model.cfg.crop_size if size is None else (size, size)
    if min(pixels) < model.encoder.patch_size:
        raise ConfigError(f"--size is {size}; expected at least {model.encoder.patch_size} pixels, a patch")
    return Sampling(frames or model.cfg.num_frames, fps or own_fps or 4.0, pixels, clips)
