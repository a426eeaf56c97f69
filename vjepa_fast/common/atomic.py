"""Writes files atomically: whole or absent, even on power loss or a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vjepa_fast.common.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block wrote there is synced and renamed over `path`.

    If the block raises, the temporary file is deleted and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole. Names of files that are not valid UTF-8 are written back as they were."""
    with disk_errors(path), atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


@contextmanager
def disk_errors(path: Path, what: str = "", advice: str = "continue with --resume") -> Iterator[None]:
    """Turns an OSError into a UserError that names `path`.

    Args:
        path: file that is being written.
        what: what it is, for the message.
        advice: what to do when a full disk has room again.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a failed write into a RuntimeError; the cause is the OSError behind it, if any.
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None and not str(error).startswith("[enforce fail at inline_container"):
            raise
        full = cause is not None and cause.errno in _FULL
        if full:
            reason = f"the disk is full; free some space and {advice}"
        else:
            reason = (cause.strerror if cause is not None else None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {what + ' ' if what else ''}{path}: {reason}") from error


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a killed run left in its folder."""
    for leftover in folder.glob(".*.tmp*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; it may be absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
