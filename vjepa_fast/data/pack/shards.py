"""Reads bytes of shards from a disk or a remote address."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vjepa_fast.common.cache_dir import default_cache_dir
from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.pack.index import INDEX_NAME, header_end

Range = tuple[int, int]
# Far from the 1024 files that a process may have open by default.
_MAX_OPEN = 128
_NUM_TRIES = 3
_FIRST_PAUSE = 0.2
# A header is below 2 KB.
_HEADER_BYTES = 1 << 14


class Shards(Protocol):
    """Where the shards of a pack lie. It can be pickled, and used by a process that was forked."""

    max_gap: int
    """Unwanted bytes that cost less than another read."""

    def read(self, shard: str, ranges: Sequence[Range]) -> list[bytes]:
        """Some bytes [start, end) of a shard, fewer where it ends before.

        Raises:
            DecodeError: it cannot be read.
        """
        ...


class LocalShards:
    """Shards in a folder. A process opens those it reads, and keeps the last ones open."""

    max_gap = 64 << 10

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process = os.getpid()
        self._files: OrderedDict[str, Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalShards, (self._folder,)

    def read(self, shard: str, ranges: Sequence[Range]) -> list[bytes]:
        try:
            file = self._file(shard)
            return [_read_at(file, start, end - start) for start, end in ranges]
        except FileNotFoundError as error:
            raise DecodeError(f"{shard} of pack {self._folder} is missing") from error
        except OSError as error:
            raise DecodeError(f"{shard} of pack {self._folder} cannot be read: {error.strerror or error}") from error

    def _file(self, shard: str) -> Any:
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), OrderedDict()
        file = self._files.pop(shard, None)
        if file is None:
            file = open(os.path.join(self._folder, shard), "rb", buffering=0)  # noqa: SIM115
        self._files[shard] = file
        if len(self._files) > _MAX_OPEN:
            self._files.popitem(last=False)[1].close()
        return file


def _read_at(file: Any, start: int, count: int) -> bytes:
    if not hasattr(os, "pread"):
        file.seek(start)
        return file.read(count)
    data = os.pread(file.fileno(), count, start)
    while data and len(data) < count:
        # One call reads 2 GB at most, and less where a signal comes in between.
        more = os.pread(file.fileno(), count - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


class RemoteShards:
    """Shards behind an address that fsspec knows, read by ranges."""

    # A request takes about as long as half a megabyte.
    max_gap = 512 << 10

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._process = -1
        self._opened: tuple[Any, str] = (None, "")

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteShards, (self._address,)

    def read(self, shard: str, ranges: Sequence[Range]) -> list[bytes]:
        return [self._read(shard, *one) for one in ranges]

    def _read(self, shard: str, start: int, end: int) -> bytes:
        for attempt in range(_NUM_TRIES):
            try:
                system, root = self._system()
                data = system.cat_file(f"{root}/{shard}", start=start, end=end)
            except FileNotFoundError as error:
                raise DecodeError(f"{shard} of pack {self._address} is missing") from error
            # Every kind of server has errors of its own.
            except Exception as error:
                if attempt == _NUM_TRIES - 1:
                    what = " ".join(str(error).split()) or type(error).__name__
                    raise DecodeError(
                        f"{shard} of pack {self._address} cannot be read ({_NUM_TRIES} tries): {what}"
                    ) from error
                time.sleep(_FIRST_PAUSE * 4**attempt)
            else:
                if len(data) > end - start:
                    raise DecodeError(
                        f"the server of pack {self._address} sends whole files where a part is asked for "
                        "(no HTTP range requests); copy the pack to a disk, or use another server"
                    )
                return data
        raise AssertionError

    def _system(self) -> tuple[Any, str]:
        # The threads in which fsspec talks to a server do not survive a fork.
        if self._process != os.getpid():
            self._opened, self._process = _open_address(self._address, skip_instance_cache=True), os.getpid()
        return self._opened

    def cached_index(self, cache_dir: Path | None) -> Path:
        """A local copy of the pack's index, downloaded if there is none of the same content yet.

        Raises:
            UserError: it cannot be had.
        """
        try:
            head = self._read(INDEX_NAME, 0, _HEADER_BYTES)
        except DecodeError as error:
            raise UserError(
                f"dataset {self._address!r} is no finished pack: {error}; expected the address of a folder that "
                "`vjepa-fast pack` made"
            ) from error
        # The header holds the checksum of the rest.
        with contextlib.suppress(ValueError):
            head = head[: header_end(head)]
        name = hashlib.sha256(self._address.encode() + b"\0" + head).hexdigest()
        path = (cache_dir or default_cache_dir()) / "packs" / f"{name}.index"
        if path.exists():
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                system, root = self._system()
                system.get_file(f"{root}/{INDEX_NAME}", os.path.join(folder, INDEX_NAME))
                os.replace(os.path.join(folder, INDEX_NAME), path)
        except Exception as error:
            what = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the index of pack {self._address!r} cannot be copied to {path.parent}: {what}. "
                "data.cache_dir names another folder for it"
            ) from error
        return path


def _open_address(address: str, **options: Any) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        scheme = address.partition("://")[0]
        extra = {"s3": "s3", "http": "http", "https": "http"}.get(scheme)
        hint = f"pip install 'vjepa-fast[{extra}]'" if extra else str(error)
        raise UserError(f"dataset {address!r} needs a package that is not installed: {hint}") from error
    except ValueError as error:
        raise UserError(f"dataset {address!r}: {error}") from error
