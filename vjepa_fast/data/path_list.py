"""Stores many paths in little memory, shared by forked processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PathList(Sequence[str]):
    """A read-only list of strings in two buffers: a million paths cost their characters and 8 MB.

    A list of str would be copied into every worker, page by page, as reference counts are touched.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._blob: bytes | np.ndarray = b"".join(encoded)

    @classmethod
    def of_buffers(cls, ends: np.ndarray, text: np.ndarray) -> PathList:
        """From where each string ends, int64 [N], and the characters of all, uint8, as `buffers` gives them."""
        new = cls(())
        new._ends, new._blob = ends, text
        return new

    def buffers(self) -> tuple[np.ndarray, bytes | np.ndarray]:
        """Where each string ends, and the characters of all."""
        return self._ends, self._blob

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(bytes(self._blob[start : int(self._ends[index])]))
