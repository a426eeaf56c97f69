"""Writes sharded checkpoints, step<N>.dcp folders: every process writes its part.

vjepa_fast.checkpoints.sharded_format says what they hold.

A folder is written under a temporary name and renamed when all processes have written and synced their parts and the
manifest holds the checksums, so at no moment is there none that is whole. The newest step counts; it has no other name.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from vjepa_fast.checkpoints import meta_format
from vjepa_fast.checkpoints.run_folder import LATEST, MANIFEST, SHARDS, previous_checkpoints
from vjepa_fast.checkpoints.sharded_format import METADATA, REST, Entry, Folder, joined, manifest_text, split
from vjepa_fast.checkpoints.writer import copy_to_host, link
from vjepa_fast.common.atomic import disk_errors, remove, sync
from vjepa_fast.common.errors import UserError
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.optim.adamw_ema import AdamWEMA


@dataclass(frozen=True)
class _Written(WriteResult):
    """A part of a tensor, and what the file holds that it was written to."""

    file: str = ""
    entry: Entry = Entry(0, 0)


class _Writer(dcp.FileSystemWriter):
    """Writes a folder; each process looks at the checksum of its files, the first one ends with `complete`.

    Args:
        folder: temporary name.
        complete: called in the first process with all files that processes have written.
    """

    def __init__(self, folder: Path, complete: Callable[[dict[str, Entry]], None]) -> None:
        super().__init__(folder)
        self._complete = complete

    def write_data(self, plan: Any, planner: Any) -> TorchFuture[list[WriteResult]]:
        """As FileSystemWriter.

        Raises:
            OSError: as such, also where torch's zip writer makes a RuntimeError of it: what is sent to the other
                processes loses what is behind it.
        """
        try:
            results = super().write_data(plan, planner).wait()
        except RuntimeError as error:
            cause = next((e for e in (error.__cause__, error.__context__) if isinstance(e, OSError)), None)
            raise (error if cause is None else OSError(cause.errno, cause.strerror)) from error
        folder = Path(self.path)
        names = {result.storage_data.relative_path for result in results}
        entries = {name: Entry.of(folder / name) for name in names}
        written: TorchFuture[list[WriteResult]] = TorchFuture()
        written.set_result(
            [
                _Written(result.index, result.size_in_bytes, result.storage_data, name, entries[name])
                for result in results
                for name in [result.storage_data.relative_path]
            ]
        )
        return written

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        """As FileSystemWriter."""
        super().finish(metadata, results)
        self._complete({part.file: part.entry for parts in results for part in parts if isinstance(part, _Written)})


class ShardedWriter:
    """Writes the checkpoints of a run as folders; all processes call it.

    As vjepa_fast.checkpoints.writer.CheckpointWriter.

    Args:
        folder, keep_last, background: as CheckpointWriter; in the background it is
            torch.distributed.checkpoint.async_save that writes.
        step: of the latest.pt in the folder, if the run continues it.
    """

    def __init__(self, folder: Path, keep_last: int, background: bool = False, step: int | None = None) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._background = background
        self._step = step
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        # Of its own: the thread that writes must not come between what the training processes send each other.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if self._group is None:
            # It is what is wanted with one process; a thread of torch's says so too.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._writing: Future[Any] | None = None
        self._path: Path | None = None

    def forget_after(self, step: int) -> None:
        """As CheckpointWriter; called in the first process."""
        for number, path in previous_checkpoints(self.folder):
            if number > step:
                remove(path)

    def write(self, contents: dict[str, Any], step: int, also: Path | None = None) -> None:
        """Make `contents` the newest checkpoint.

        In the background, this first waits for the write before it.

        Args:
            contents: in the layout of the single file, with the tensors that this process has; may change once this
                returns.
            step: steps done.
            also: the name of the single file that would stay for good; the folder of that name does.

        Raises:
            UserError: as CheckpointWriter.write.
        """
        self.wait()
        path = self._path = self.folder / f"step{step}{SHARDS}"
        temporary = self.folder / f".step{step}.tmp{SHARDS}"
        rest, tensors = split(contents)
        rest = copy_to_host(rest)
        if self._is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            # Before the write, so that there is room; at least one is left.
            self._retire_latest(step)
            self._prune(max(1, self._keep_last - 1), step)
        if self._group is not None:
            dist.barrier(group=self._group)

        def complete(files: dict[str, Entry]) -> None:
            with open(temporary / REST, "wb") as file:
                torch.save(rest, file)
            for name in (METADATA, REST):
                files[name] = Entry.of(temporary / name)
            (temporary / MANIFEST).write_text(manifest_text(files, step), encoding="utf-8")
            for written in (temporary / REST, temporary / MANIFEST, temporary):
                sync(written)
            remove(path)
            os.replace(temporary, path)
            sync(self.folder)
            if also is not None:
                _link_folder(path, also.with_suffix(SHARDS))
            (self.folder / LATEST).unlink(missing_ok=True)
            self._prune(self._keep_last, step)

        writer = _Writer(temporary, complete)
        if self._background:
            writing = dcp.async_save(
                tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None
            )
            assert isinstance(writing, Future)
            self._writing = writing
            return
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            self._fail(error, temporary)

    def wait(self) -> None:
        """As CheckpointWriter."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except CheckpointException as error:
                assert self._path is not None
                self._fail(error, self.folder / f".{self._path.stem}.tmp{SHARDS}")

    def _retire_latest(self, step: int) -> None:
        """A latest.pt that the run has gone on from gets the name of its step."""
        latest = self.folder / LATEST
        if latest.exists() and self._step is not None and self._step != step:
            link(latest, self.folder / f"step{self._step}.pt")

    def _prune(self, count: int, step: int) -> None:
        others = [path for number, path in previous_checkpoints(self.folder) if number != step]
        there = (self.folder / f"step{step}{SHARDS}").exists()
        for path in others[max(0, count - there) :]:
            remove(path)

    def _fail(self, error: CheckpointException, temporary: Path) -> NoReturn:
        """Raises the cause as what a user can do about it."""
        if self._is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next((cause for cause, _ in error.failures.values()), None)
        assert self._path is not None
        before = ". The checkpoint written before it is intact" if previous_checkpoints(self.folder) else ""
        try:
            with disk_errors(self._path, "checkpoint"):
                raise cause if cause is not None else error
        except UserError as told:
            raise UserError(f"{told}{before}") from error


def load(path: Path, model: VJEPA, optimizer: AdamWEMA, scaler: torch.amp.GradScaler | None = None) -> dict[str, Any]:
    """As vjepa_fast.checkpoints.meta_format.load_checkpoint, of a folder; each process reads what it needs.

    Raises:
        UserError: it cannot be read or does not fit.
    """
    folder = Folder(path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like: dict[str, Tensor] = {
        f"opt.{number}.{name}": parameter for number, parameter in enumerate(parameters) for name in meta_format.MOMENTS
    }
    tensors: dict[str, Tensor] = {}
    networks = {
        f"{network}.{name}": value
        for network in meta_format.NETWORKS
        for name, value in getattr(model, network).state_dict().items()
    }
    for name, (size, dtype) in folder.sizes.items():
        own = networks.get(name, like.get(name))
        if own is None or own.shape != size:
            # It is refused below, with the reason.
            tensors[name] = torch.empty(size, dtype=dtype, device="meta")
        else:
            tensors[name] = own.detach() if name in networks else torch.empty_like(own, dtype=dtype)
    if not any(tensor.is_meta for tensor in tensors.values()):
        folder.read_into(tensors)
    return meta_format.load_contents(joined(folder.rest, tensors), path, model, optimizer, scaler)


def _link_folder(path: Path, name: Path) -> None:
    """A second name for all files of a folder."""
    temporary = name.with_name(f".{name.stem}.tmp{SHARDS}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in path.iterdir():
        link(file, temporary / file.name)
    remove(name)
    os.replace(temporary, name)
