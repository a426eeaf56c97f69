"""Sharded checkpoints: folders written by torch.distributed.checkpoint, read without a process group.

A folder holds

    manifest.json       name, size and CRC-32 of every other file
    run.pt              what the single file holds beside weights and moments: epoch, step, config, schedules, masks
    .metadata           of torch.distributed.checkpoint: which part of which tensor lies where
    __<rank>_<n>.distcp the tensors, as each process had them

Tensors are called encoder.<name>, predictor.<name>, target_encoder.<name>, opt.<number>.exp_avg and
opt.<number>.exp_avg_sq. manifest.json is written last; a folder without it is no checkpoint.

`.metadata` is a pickle. It is read by an unpickler that knows the few classes of which such a file consists and refuses
all others, tensors only, in files that the manifest names. Nothing that a folder holds is run.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.checkpoints import meta_format
from vjepa_fast.checkpoints.run_folder import MANIFEST
from vjepa_fast.common.errors import UserError

METADATA = ".metadata"
REST = "run.pt"
FORMAT = 1

_CHUNK = 1 << 22

_ALLOWED = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch", str(dtype).removeprefix("torch."))
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        ),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
    }
)
"""What a `.metadata` may name. Not BytesStorageMetadata, whose contents torch would unpickle without restriction."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Entry:
    """A file of a folder."""

    size: int
    """Bytes."""
    crc: int
    """CRC-32."""

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Reads all of the file."""
        size, crc = 0, 0
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return cls(size, crc)


def is_dcp(path: Path) -> bool:
    """Whether a path is a checkpoint of shards, whole or not."""
    return path.is_dir() and any((path / name).exists() for name in (MANIFEST, METADATA, REST))


def manifest_text(files: dict[str, Entry], step: int) -> str:
    """Contents of manifest.json."""
    entries = {name: {"size": entry.size, "crc32": f"{entry.crc:08x}"} for name, entry in sorted(files.items())}
    return json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a folder by their names.

    Raises:
        ValueError: the manifest is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        number, files = (
            int(manifest["format"]),
            {
                str(name): Entry(int(entry["size"]), int(entry["crc32"], 16))
                for name, entry in manifest["files"].items()
            },
        )
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged") from error
    if number != FORMAT:
        raise ValueError(f"it has the format {number}, of a later version of vjepa-fast; this one reads {FORMAT}")
    if {METADATA, REST} - files.keys() or any(Path(name).name != name for name in files):
        raise ValueError(f"its {MANIFEST} is damaged")
    return files


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a folder, after reading all of it; None if nothing is.

    Args:
        folder: to look at.
        share: (i, n): only every n-th file, from the i-th on, is read.
    """
    if not folder.exists():
        return "it is gone"
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name in sorted(files)[share[0] :: share[1]]:
        path, wanted = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != wanted.size:
                return f"its part {name} has {size} bytes in place of {wanted.size}"
            if Entry.of(path) != wanted:
                return f"the checksum of its part {name} is wrong"
        except FileNotFoundError:
            return f"its part {name} is gone"
        except OSError as error:
            return f"its part {name} cannot be read ({error.strerror})"
    return None


class Folder:
    """A folder of shards that is read.

    Args:
        path: of the folder. Checksums are not looked at; see `damage`.

    Attributes:
        rest: what run.pt holds, in the layout of the single file.
        sizes: shape and dtype of every tensor, by name.

    Raises:
        UserError: it cannot be read, or wants to run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            files = read_manifest(path)
        except ValueError as error:
            raise UserError(f"checkpoint {path} cannot be read: {error}") from error
        self.rest = meta_format.read(path / REST)
        opt = self.rest.get("opt", {})
        if not isinstance(opt, dict) or not isinstance(opt.get("state", {}), dict):
            raise UserError(f"checkpoint {path} cannot be read: its {REST} is damaged")
        self._metadata = self._read_metadata(files)
        self.sizes: dict[str, tuple[torch.Size, torch.dtype]] = {
            name: (entry.size, entry.properties.dtype) for name, entry in self._metadata.state_dict_metadata.items()
        }

    def _read_metadata(self, files: Iterable[str]) -> Any:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

        try:
            with open(self.path / METADATA, "rb") as file:
                metadata = _Unpickler(file).load()
            assert isinstance(metadata, Metadata)
            assert all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values())
            for info in metadata.storage_data.values():
                assert isinstance(info, _StorageInfo) and not info.transform_descriptors
                assert info.relative_path in files
        except pickle.UnpicklingError as error:
            raise UserError(
                f"checkpoint {self.path}: its {METADATA} is damaged or holds more than places of tensors "
                f"({error}); nothing in it was run"
            ) from error
        except Exception as error:
            # Damaged, it makes the reader fail in any way.
            raise UserError(f"checkpoint {self.path} cannot be read: its {METADATA} is damaged") from error
        return metadata

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors from the folder. Each process reads what it needs of it, for a DTensor its shard.

        Args:
            tensors: by name, with the shapes that the folder has.
        """
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.metadata import Metadata

        metadata = self._metadata

        class Reader(dcp.FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
                known: Metadata = metadata
                return known

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(dict(tensors), storage_reader=Reader(self.path), no_dist=True)
        except dcp.api.CheckpointException as error:
            raise UserError(
                f"checkpoint {self.path} cannot be read: a part of it is missing, truncated or damaged"
            ) from error

    def contents(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
        """What the single file would hold, on the CPU.

        Args:
            wanted: which tensors, by their names; the others are left out.
        """
        tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self.sizes.items() if wanted(name)}
        self.read_into(tensors)
        return joined(self.rest, tensors)


def split(contents: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the single file holds (see vjepa_fast.checkpoints.meta_format) as run.pt's part and the tensors by name."""
    tensors: dict[str, Tensor] = {}
    for network in meta_format.NETWORKS:
        tensors |= {
            f"{network}.{name.removeprefix(meta_format.PREFIX)}": value for name, value in contents[network].items()
        }
    states = {}
    for number, state in contents["opt"]["state"].items():
        states[number] = {name: value for name, value in state.items() if name not in meta_format.MOMENTS}
        tensors |= {f"opt.{number}.{name}": state[name] for name in meta_format.MOMENTS if name in state}
    rest = {key: value for key, value in contents.items() if key not in meta_format.NETWORKS}
    return {**rest, "opt": {**contents["opt"], "state": states}}, tensors


def joined(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The other way round."""
    contents: dict[str, Any] = {network: {} for network in meta_format.NETWORKS}
    opt = rest.get("opt") or {}
    states = {number: dict(state) for number, state in opt.get("state", {}).items()}
    for name, value in tensors.items():
        head, _, tail = name.partition(".")
        if head in meta_format.NETWORKS:
            contents[head][meta_format.PREFIX + tail] = value
        elif head == "opt":
            number, _, moment = tail.partition(".")
            states.setdefault(int(number), {})[moment] = value
    return {**contents, **rest, "opt": {**opt, "state": states}}
