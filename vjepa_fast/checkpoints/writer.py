"""Writes the checkpoints of a run folder, at once or in the background, and verifies them.

latest.pt is the newest. Before another takes its place it gets a second name, step<N>.pt, so that up to `keep_last`
checkpoints are there; a hard link costs no time and no space. At no moment is there none: where the file system has no
hard links, the second name is a copy.
"""

from __future__ import annotations

import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vjepa_fast.checkpoints import sharded_format
from vjepa_fast.checkpoints.atomic_save import write_atomically
from vjepa_fast.checkpoints.run_folder import LATEST, SHARDS, newest_checkpoint, previous_checkpoints, written_at
from vjepa_fast.common.atomic import atomic_path, disk_errors, remove
from vjepa_fast.common.errors import UserError
from vjepa_fast.distributed.processes import Processes


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        folder: run folder.
        keep_last: how many of the last checkpoints stay, latest.pt among them; at most that many and the one being
            written, or two if it is one, are on the disk at a time.
        background: return from `write` as soon as the contents are copied, and let a thread write them.
        step: of the latest.pt in the folder, if the run continues it.
    """

    def __init__(self, folder: Path, keep_last: int, background: bool = False, step: int | None = None) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._background = background
        self._step = step
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def forget_after(self, step: int) -> None:
        """Delete what a run that has gone back to an earlier step left of its later ones."""
        for number, path in previous_checkpoints(self.folder):
            if number > step:
                remove(path)

    def write(self, contents: dict[str, Any], step: int, also: Path | None = None, copied: bool = False) -> None:
        """Make `contents` the new latest.pt.

        In the background, this first waits for the write before it.

        Args:
            contents: of the checkpoint; tensors may change once this returns.
            step: steps done.
            also: a second name, under which the checkpoint stays for good.
            copied: nobody else has these tensors.

        Raises:
            UserError: the disk is full or the folder cannot be written, now or in the background before. The checkpoint
                written last is intact.
        """
        self.wait()
        if not self._background:
            self._write(contents, step, also)
            return
        contents = contents if copied else copy_to_host(contents)
        self._thread = threading.Thread(target=self._write_and_remember, args=(contents, step, also), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            UserError: as write.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_and_remember(self, contents: dict[str, Any], step: int, also: Path | None) -> None:
        try:
            self._write(contents, step, also)
        except BaseException as error:
            self._error = error

    def _write(self, contents: dict[str, Any], step: int, also: Path | None) -> None:
        latest = self.folder / LATEST
        if self._step is not None and self._keep_last > 1 and latest.exists():
            link(latest, self.folder / f"step{self._step}.pt")
        # First, so that there is room; what is left is at least latest.pt.
        kept = self._keep_last - 1 if latest.exists() else self._keep_last
        for _, path in previous_checkpoints(self.folder)[kept:]:
            remove(path)
        write_atomically(latest, contents)
        self._step = step
        if also is not None:
            link(latest, also)


def copy_to_host(value: Any) -> Any:
    """Nested dicts and lists with every tensor copied to the CPU, the same one for tensors that are one."""
    copies: dict[int, Tensor] = {}

    def copy(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in copies:
                copies[id(item)] = item.detach().to("cpu", copy=True)
            return copies[id(item)]
        if isinstance(item, dict):
            return {key: copy(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(copy(entry) for entry in item)
        return item

    return copy(value)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file or a folder of shards, after reading all of it; None if nothing is.

    torch.save writes a zip archive, which holds a CRC-32 of each tensor; torch.load does not look at them.
    """
    if path.suffix == SHARDS or path.is_dir():
        return sharded_format.damage(path)
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except FileNotFoundError:
        return "it is gone"
    except Exception as error:
        # A damaged file makes the reader fail in any way.
        return f"it is cut short or damaged ({str(error) or type(error).__name__})"
    return f"the checksum of its part {bad} is wrong" if bad else None


def choose_whole(folder: Path, processes: Processes, say: Callable[[str], None]) -> Path:
    """The newest checkpoint of the run folder, or the newest that is whole, which is then said.

    Raises:
        UserError: none is.
    """
    latest = newest_checkpoint(folder) or folder / LATEST
    if latest.suffix == SHARDS:
        wrong = sharded_format.damage(latest, (processes.rank, processes.world_size))
    else:
        # One process reads the file, not all at once.
        wrong = damage(latest) if processes.is_first else None
    if not processes.largest(int(wrong is not None)):
        return latest
    if wrong is None and processes.is_first:
        # Another process has found it.
        wrong = damage(latest)
    whole = newest_whole(folder)
    if whole is None:
        raise UserError(
            f"checkpoint {latest} cannot be continued: {wrong or 'it is damaged'}; and {folder} holds no "
            "other that is whole. Start again with another --out, or continue another checkpoint with "
            "train.read_checkpoint=FILE and another --out"
        )
    say(f"checkpoint {latest} is left aside: {wrong}; the newest whole one is {whole.name}")
    return whole


def check_whole(path: Path) -> None:
    """Raises:
    UserError: the checkpoint is damaged. Files of torch before 1.6, which have no checksums, are not checked.
    """
    wrong = damage(path) if path.is_dir() or zipfile.is_zipfile(path) else None
    if wrong is not None:
        raise UserError(f"checkpoint {path} cannot be read: {wrong}")


def newest_whole(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a run folder beside latest.pt."""
    found = [path for _, path in previous_checkpoints(folder)]
    found += [*folder.glob("e*.pt"), *folder.glob(f"e*{SHARDS}")]
    found.sort(key=written_at, reverse=True)
    return next((path for path in found if damage(path) is None), None)


def link(path: Path, name: Path) -> None:
    """A second name for a file; where the file system has no hard links, a copy."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        with disk_errors(name, "checkpoint"), atomic_path(name) as temporary:
            shutil.copyfile(path, temporary)
