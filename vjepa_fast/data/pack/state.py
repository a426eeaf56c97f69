"""The state of an unfinished pack: parts (one a video) and shards.

    .unfinished/settings.json            what the pack is made with; another command is refused
    .unfinished/parts/00000012.json      what became of video 12, and beside it, if it could be packed,
    .unfinished/parts/00000012.tar       its members
    .unfinished/shards/000003.json       what shard 3 holds; its parts are gone

Everything is written under a temporary name and renamed, .json last of its pair, so what is there is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vjepa_fast.common.atomic import atomic_path, disk_errors, remove_leftovers
from vjepa_fast.common.errors import UserError
from vjepa_fast.data.pack.encode import Encoded
from vjepa_fast.data.pack.index import INDEX_NAME, shard_name
from vjepa_fast.data.pack.reader import UNFINISHED

ADVICE = "run the same command to continue"
# The workers of a command that was killed are gone within a second.
_LOCK_SECONDS = 5.0
# Two blocks of zeros end a tar file.
_END_OF_TAR = bytes(1024)


@dataclass
class Part:
    """What became of one video.

    Attributes:
        number: its place in the manifest.
        reason: why it is left out; None where it is packed.
        encoded: of a packed one.
        part_bytes, part_crc: of its members.
        source_bytes: of the video.
        cpu_ms: core-milliseconds it took.
    """

    number: int
    reason: str | None
    encoded: Encoded | None = None
    part_bytes: int = 0
    part_crc: int = 0
    source_bytes: int = 0
    cpu_ms: float = 0.0

    @staticmethod
    def of_json(values: dict[str, Any]) -> Part:
        encoded = values.pop("encoded")
        return Part(**values, encoded=None if encoded is None else Encoded(**encoded))


@dataclass
class Shard:
    """A finished shard.

    Attributes:
        num_bytes: of the file.
        end: the first video of the manifest that comes after it.
        parts: all that were looked at for it, broken ones too.
    """

    num_bytes: int
    end: int
    parts: list[Part]


class State:
    """The folder of an unfinished pack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / UNFINISHED
        self.shards: list[Shard] = []

    def begin(self, about: dict[str, Any]) -> None:
        """Makes the folder, or checks that it was begun by the same command.

        Raises:
            UserError: it was not, or holds something else.
        """
        file = self.root / "settings.json"
        with disk_errors(self.root, advice=ADVICE):
            if not file.exists():
                found = set(os.listdir(self.folder)) - {UNFINISHED} if self.folder.exists() else set()
                # With an index it is a pack that another command has just finished.
                if found and INDEX_NAME not in found:
                    raise UserError(f"--out {self.folder} is no pack and not empty; expected a new folder")
                for part in ("parts", "shards"):
                    (self.root / part).mkdir(parents=True, exist_ok=True)
                with atomic_path(file) as temporary:
                    temporary.write_text(json.dumps(about))
            begun = json.loads(file.read_text())
        check_same(self.folder, begun, about)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second command out."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        # Another command that finishes takes the folder away.
        self.root.mkdir(exist_ok=True)
        with (self.root / "lock").open("w") as file:
            until = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise UserError(
                            f"another `vjepa-fast pack` is writing to {self.folder}; wait until it is done, or stop it"
                        ) from None
                time.sleep(0.1)
            yield

    def load(self) -> dict[int, Part]:
        """Reads what is there, and deletes what cannot be used.

        Returns:
            Finished parts that are in no shard yet. Broken ones are not among them: a file may have come back.
        """
        self.shards = []
        for number in range(len(list((self.root / "shards").glob("*.json")))):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                values = json.loads(self._shard_file(number).read_text())
                shard = Shard(values["num_bytes"], values["end"], [Part.of_json(part) for part in values["parts"]])
                if (self.folder / shard_name(number)).stat().st_size == shard.num_bytes:
                    self.shards.append(shard)
                    continue
            break
        for folder in (self.folder, self.root / "parts", self.root / "shards"):
            remove_leftovers(folder)
        for file in (self.root / "shards").iterdir():
            if int(file.stem) >= len(self.shards):
                file.unlink()
        for file in self.folder.glob("shard-*.tar"):
            if file.name not in {shard_name(number) for number in range(len(self.shards))}:
                file.unlink()
        parts = {}
        for file in (self.root / "parts").glob("*.json"):
            part = self._usable(file)
            if part is not None and part.number >= self.num_sharded:
                parts[part.number] = part
        for file in (self.root / "parts").iterdir():
            if int(file.stem) not in parts:
                file.unlink()
        return parts

    @property
    def num_sharded(self) -> int:
        """Videos of the manifest that finished shards account for."""
        return self.shards[-1].end if self.shards else 0

    def _usable(self, file: Path) -> Part | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            part = Part.of_json(json.loads(file.read_text()))
            data = file.with_suffix(".tar").read_bytes() if part.reason is None else b""
            if part.reason is None and (len(data), zlib.crc32(data)) == (part.part_bytes, part.part_crc):
                return part
        return None

    def part_file(self, number: int) -> Path:
        """Where the members of a video are kept until they are in a shard."""
        return self.root / "parts" / f"{number:08d}.tar"

    def write_part(self, part: Part) -> None:
        """Puts down what became of a video, whose members are written."""
        temporary = self.root / "parts" / f".{part.number:08d}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(asdict(part)))
        os.replace(temporary, self.part_file(part.number).with_suffix(".json"))

    def _shard_file(self, number: int) -> Path:
        return self.root / "shards" / f"{number:06d}.json"

    def close_shard(self, temporary: Path, shard: Shard) -> None:
        """Puts a shard in its place; its parts are no longer needed."""
        number = len(self.shards)
        os.replace(temporary, self.folder / shard_name(number))
        with atomic_path(self._shard_file(number)) as file:
            file.write_text(json.dumps(asdict(shard)))
        self.shards.append(shard)
        for part in shard.parts:
            self.part_file(part.number).unlink(missing_ok=True)
            self.part_file(part.number).with_suffix(".json").unlink(missing_ok=True)

    def remove(self) -> None:
        """When the pack is finished."""
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass
class ShardAssembler:
    """Joins parts, in the order of the manifest, to shards.

    Attributes:
        state: where shards go.
        shard_bytes: a shard ends before the part that would make it larger.
        waiting: finished parts whose turn has not come.
        parts: of the shard that is being written, and broken ones behind it.
    """

    state: State
    shard_bytes: int
    waiting: dict[int, Part]
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next = self.state.num_sharded
        self._size = 0
        self._file: BinaryIO | None = None
        self._path = self.state.root / "shard.tar"

    def add(self, part: Part | None = None) -> None:
        """Takes one more finished part, and joins those whose turn has come."""
        if part is not None:
            self.waiting[part.number] = part
        while self._next in self.waiting:
            part = self.waiting.pop(self._next)
            if part.reason is None:
                if self._size and self._size + part.part_bytes + len(_END_OF_TAR) > self.shard_bytes:
                    self._close()
                self._append(part)
            self.parts.append(part)
            self._next += 1

    def finish(self) -> list[Part]:
        """Ends the last shard. What is returned are broken videos behind it."""
        assert not self.waiting
        if self._size:
            self._close()
        return self.parts

    def _append(self, part: Part) -> None:
        if self._file is None:
            self._file = self._path.open("wb")
        with self.state.part_file(part.number).open("rb") as file:
            shutil.copyfileobj(file, self._file, 1 << 20)
        self._size += part.part_bytes

    def _close(self) -> None:
        assert self._file is not None
        with self._file as file:
            file.write(_END_OF_TAR)
            file.flush()
            os.fsync(file.fileno())
        self.state.close_shard(self._path, Shard(self._size + len(_END_OF_TAR), self._next, self.parts))
        self._size, self._file, self.parts = 0, None, []

    def abandon(self) -> None:
        """Closes the file that is being written; its parts are still there."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._path.unlink(missing_ok=True)


def check_same(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to mix two packs in one folder.

    Raises:
        UserError: a setting, or the manifest, is another.
    """
    changed = [f"{name} {begun.get(name)} (now {value})" for name, value in now.items() if begun.get(name) != value]
    if changed:
        raise UserError(
            f"--out {folder} was begun with {', '.join(changed)}; expected the same again, or another folder"
        )
