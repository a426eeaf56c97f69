"""Writes checkpoint files atomically: whole or absent, even on power loss or a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vjepa_fast.common.atomic import atomic_path, disk_errors
from vjepa_fast.common.errors import UserError


def write_atomically(path: Path, contents: dict[str, Any]) -> None:
    """torch.save to a temporary file beside `path`, synced, then renamed over it.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was at `path` is untouched.
    """
    try:
        with disk_errors(path, "checkpoint"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save(contents, file)
    except UserError as error:
        if path.exists():
            raise UserError(f"{error}. The checkpoint written before it is intact") from error
        raise
