"""Stores the features of a frozen encoder on disk, so that they are computed once.

The folder of an encoder is named by a hash over the bytes of its weights, its config and the dtype; an entry in it by
a hash over the video file (path, size, time of change) and the rule by which it becomes clips. Whatever changes, other
names are looked for, and nothing old is ever read for new. Entries lie in .safetensors files that are whole or absent:
a job that is killed goes on with what is missing.

Entries: `t.<hash>`, all tokens, [views, segments * N, D] in the compute dtype; `m.<hash>`, their mean, fp32 [views, D].
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vjepa_fast import __version__
from vjepa_fast.common.atomic import disk_errors, write_text
from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.pool import Failed, Pool
from vjepa_fast.evaluation import probes
from vjepa_fast.evaluation.views import ClipRule, read_views
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.inference.part_files import AGAIN, PartFiles
from vjepa_fast.inference.videos import Videos

_FORMAT = 1
_LEFTOVER_SECONDS = 3600.0
TOKENS, MEAN = "t", "m"


def encoder_hash(model: InferenceModel) -> str:
    """Hexadecimal hash of the weights to the bit, the config and the dtype."""
    digest = hashlib.sha256(json.dumps([_FORMAT, __version__, model.cfg.model_dump(mode="json")]).encode())
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A video by a rule.

    Attributes:
        videos, number: which video.
        rule: how it becomes clips.
        key: hash over the file and the rule.
    """

    videos: Videos
    number: int
    rule: ClipRule
    key: str


def entries_of(videos: Videos, rules: Sequence[ClipRule]) -> list[list[Entry]]:
    """An entry for every video, by every rule; each file is looked at once."""
    files = [_file(videos, number) for number in range(len(videos.paths))]
    found = []
    for rule in rules:
        text = json.dumps(asdict(rule))
        found.append(
            [
                Entry(videos, number, rule, hashlib.sha256(f"{text}\0".encode() + file).hexdigest()[:40])
                for number, file in enumerate(files)
            ]
        )
    return found


def _file(videos: Videos, number: int) -> bytes:
    """Path, size and time of change of what a video is read from."""
    path, place = videos.file_of(number)
    try:
        stat = os.stat(path)
        place += f"\0{stat.st_size}\0{stat.st_mtime_ns}"
    except OSError:
        # It will be told when it is read.
        place += "\0missing"
    return os.fsencode(path) + b"\0" + place.encode()


@dataclass
class FillProgress:
    """How far the features are."""

    total: int
    done: int = 0
    kept: int = 0
    """Of those done, the ones that were there before."""
    broken: dict[str, str] = field(default_factory=dict)
    """Reason by path."""


class FeatureStore:
    """The features of one encoder.

    Args:
        root: of all stores.
        model: whose features they are.
    """

    def __init__(self, root: Path, model: InferenceModel) -> None:
        self.hash = encoder_hash(model)
        self.folder = root / self.hash[:32]
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        # Another process may fill the same store.
        self._part_files = PartFiles(
            lambda: self.folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.safetensors", self._open
        )
        with disk_errors(self.folder, "features to", AGAIN):
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_old_leftovers(self.folder)
        write_text(
            self.folder / "encoder.json",
            json.dumps(
                {"hash": self.hash, "weights": model.weights, "config": model.cfg.model_dump(mode="json")}, indent=1
            ),
        )
        # Names with a dot are still being written.
        for part in sorted(self.folder.glob("[!.]*.safetensors")):
            self._open(part)

    def _open(self, part: Path) -> None:
        try:
            file = safe_open(part, framework="pt", device="cpu")
            names = list(file.keys())
        except SafetensorError:
            # Damaged by something else than a kill: made again.
            part.unlink(missing_ok=True)
            return
        except OSError:
            # It may be whole, and is only of no use now.
            return
        self._files[part] = file
        self._where.update(dict.fromkeys(names, part))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """An entry, by its whole name."""
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor

    def fill(
        self,
        entries: Sequence[Entry],
        model: InferenceModel,
        device: torch.device,
        tokens: Sequence[bool],
        batch_size: int,
        num_workers: int,
        report: Callable[[FillProgress], None],
    ) -> FillProgress:
        """Compute what is missing.

        Args:
            entries: what is needed.
            model: on the CPU; moved to the device once the decoding processes are there, which CUDA does not survive.
            device: where it runs.
            tokens: of each entry, all tokens too, not only their mean.
            batch_size: clips in one call.
            num_workers: decoding processes.
            report: called after every entry.

        Raises:
            UserError: the disk is full, or features are not finite.
        """
        progress = FillProgress(len(entries))
        keys = [entry.key for entry in entries]
        left = [
            number
            for number, (key, whole) in enumerate(zip(keys, tokens, strict=True))
            if not (f"{MEAN}.{key}" in self and (not whole or f"{TOKENS}.{key}" in self))
        ]
        progress.done = progress.kept = len(entries) - len(left)
        if not left:
            model.to(device)
            return progress

        def decode(number: int) -> Any:
            torch.set_num_threads(1)
            entry = entries[number]
            try:
                source = entry.videos.open(entry.number)
                return read_views(source, entry.rule, entry.videos.paths[entry.number]).numpy()
            except DecodeError as error:
                return Failed(str(error))

        checked = False
        try:
            with Pool(decode, min(num_workers, len(left))) as pool:
                results = pool.run(left)
                model.to(device)
                for number, clips in results:
                    progress.done += 1
                    entry = entries[number]
                    if isinstance(clips, Failed):
                        progress.broken[entry.videos.paths[entry.number]] = str(clips)
                    else:
                        features = encode_views(model, torch.from_numpy(clips), batch_size, entry.rule.layers)
                        if tokens[number] and not checked:
                            checked = True
                            self._check_room(features, sum(tokens[other] for other in left))
                        self._keep(entry, features, tokens[number])
                    report(progress)
        finally:
            self._part_files.flush()
        return progress

    def _keep(self, entry: Entry, features: Tensor, whole: bool) -> None:
        mean = features.float().mean(1)
        if not mean.isfinite().all():
            raise UserError(
                f"the features of {entry.videos.paths[entry.number]} are not finite numbers; most "
                "likely the training of this encoder has diverged: give an earlier checkpoint"
            )
        self._part_files.keep(f"{MEAN}.{entry.key}", mean)
        if whole:
            self._part_files.keep(f"{TOKENS}.{entry.key}", features)

    def _check_room(self, features: Tensor, count: int) -> None:
        needed, free = features.numel() * features.element_size() * count, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the features of {count} videos take {needed / 2**30:.1f} GiB, and {self.folder} has "
                f"{free / 2**30:.1f} GiB left; name a --cache with more room, take --dtype bfloat16, fewer "
                f"segments, views or --augmented, or --probe {','.join(_probes_on_means())}, which keeps means only"
            )


def _probes_on_means() -> list[str]:
    return [name for name in probes.BUILT_IN if probes.create(name).reads == "means"]


def _remove_old_leftovers(folder: Path) -> None:
    """Of killed jobs; younger ones may be another job's that is at work."""
    for leftover in folder.glob(".*.tmp*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()


def encode_views(
    model: InferenceModel, clips: Tensor, batch_size: int, layers: tuple[int, ...] | None = None
) -> Tensor:
    """Tokens [views, segments * layers * N, D] on the CPU of clips uint8 [views, segments, T, H, W, 3]."""
    flat, parts = clips.flatten(0, 1), []
    for own in flat.split(batch_size):
        parts.append((model.encode(own) if layers is None else torch.cat(model.encode(own, layers), 1)).cpu())
    features = torch.cat(parts)
    return features.view(clips.shape[0], -1, features.shape[-1])
