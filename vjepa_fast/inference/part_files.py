"""Tensors of a long job, kept in .safetensors files that are whole or absent: a job that is killed loses seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vjepa_fast.common.atomic import atomic_path, disk_errors

AGAIN = "give the command once more: what is done is kept"
"""What to do when a disk was full."""
_SECONDS, _BYTES = 10.0, 256 * 2**20


class PartFiles:
    """Collects tensors and writes them, a file at least every ten seconds of work or 256 MiB.

    Args:
        next_path: the path of the next file.
        written: called with the path of each file that is whole.
    """

    def __init__(self, next_path: Callable[[], Path], written: Callable[[Path], None]) -> None:
        self._next_path, self._written = next_path, written
        self._waiting: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._last = time.monotonic()

    def keep(self, name: str, value: Tensor) -> None:
        """A copy of a tensor, written at the latest by `flush`.

        Raises:
            UserError: the disk is full.
        """
        self._waiting[name] = value.contiguous().clone()
        self._num_bytes += value.numel() * value.element_size()
        if time.monotonic() - self._last >= _SECONDS or self._num_bytes >= _BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            UserError: the disk is full.
        """
        self._last = time.monotonic()
        if not self._waiting:
            return
        path = self._next_path()
        with disk_errors(path, "features", AGAIN), atomic_path(path) as temporary:
            save_file(self._waiting, temporary)
        self._waiting, self._num_bytes = {}, 0
        self._written(path)
