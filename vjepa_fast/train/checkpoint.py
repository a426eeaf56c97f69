"""Checkpoint files that are whole or absent, also when the power goes or the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from vjepa_fast.errors import UserError


def write_atomically(path: Path, contents: dict[str, Any]) -> None:
    """torch.save to a temporary file beside `path`, synced, then renamed over it.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a failed write into a RuntimeError; the cause is the OSError behind it, if any.
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        temporary.unlink(missing_ok=True)
        reason = "the disk is full" if getattr(cause, "errno", None) == errno.ENOSPC else str(cause).splitlines()[0]
        kept = f"; the checkpoint written before it is intact: {path}" if path.exists() else ""
        raise UserError(f"cannot write checkpoint {path}: {reason}{kept}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed run left in its folder."""
    for leftover in folder.glob(".*.pt.*.tmp"):
        leftover.unlink(missing_ok=True)
