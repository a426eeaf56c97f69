"""Packs behind an address: the same clips as from a disk; the index is kept; what goes wrong is said."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.loader import Batch, build_loader
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.pack import shards
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.reader import Pack
from vjepa_fast.data.pack.writer import make_pack


@pytest.fixture(scope="module")
def folder(video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "pack"
    make_pack(
        *read_manifest(str(video_folder / "list.csv")), out, PackSettings(8.0, 32, 90, False, 50_000), num_workers=1
    )
    return out


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """The pack in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/packs/small/{file.name}", file.read_bytes())
    yield "memory://packs/small"
    memory.rm("/packs", recursive=True)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_FIRST_PAUSE", 0.0)


def batches(name: Any, cache_dir: Path, **changes: Any) -> list[Batch]:
    cfg = DataConfig(
        datasets=[str(name)],
        cache_dir=cache_dir,
        batch_size=4,
        dataset_fpcs=[4],
        crop_size=(32, 32),
        fps=8.0,
        **{"num_workers": 0, **changes},
    )
    with build_loader(cfg, num_steps=4) as loader:
        return list(loader)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.labels == b.labels and torch.equal(a.clips[0], b.clips[0])


def test_memory(folder: Path, address: str, tmp_path: Path) -> None:
    assert_same(batches(address, tmp_path), batches(folder, tmp_path))
    (cached,) = (tmp_path / "packs").iterdir()
    assert cached.read_bytes() == (folder / "pack.index").read_bytes()


def test_index_is_kept_until_it_changes(
    folder: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    copied = []
    get_file = type(memory).get_file

    def count(self: Any, source: str, *args: Any) -> None:
        copied.append(source)
        get_file(self, source, *args)

    monkeypatch.setattr(type(memory), "get_file", count)
    for _ in range(2):
        assert len(Pack(address, tmp_path)) == 8
    assert len(copied) == 1
    data = (folder / "pack.index").read_bytes()
    memory.pipe_file("/packs/small/pack.index", data.replace(b'"quality": 90', b'"quality": 91'))
    assert Pack(address, tmp_path).index.settings.quality == 91 and len(copied) == 2


def test_a_damaged_copy_of_the_index_is_fetched_again(folder: Path, address: str, tmp_path: Path) -> None:
    data = (folder / "pack.index").read_bytes()
    Pack(address, tmp_path)
    (cached,) = (tmp_path / "packs").iterdir()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-64], b""):
        cached.write_bytes(damaged)
        assert len(Pack(address, tmp_path)) == 8 and cached.read_bytes() == data
    # Where it is the pack's own that is damaged, no copy of it helps.
    fsspec.filesystem("memory").pipe_file("/packs/small/pack.index", data[:-64])
    cached.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="is damaged: its checksum does not fit"):
            Pack(address, tmp_path)


def test_what_goes_wrong(folder: Path, address: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    pack = Pack(address, tmp_path)
    shard = memory.cat_file("/packs/small/shard-000000.tar")
    memory.pipe_file("/packs/small/shard-000000.tar", shard[:5000])
    with pytest.raises(DecodeError, match=r"shard-000000\.tar of pack memory://packs/small is truncated"):
        pack.read(0, np.arange(5))
    memory.rm("/packs/small/shard-000000.tar")
    with pytest.raises(DecodeError, match=r"shard-000000\.tar of pack memory://packs/small is missing"):
        pack.read(0, np.arange(2))
    with pytest.raises(UserError, match="dataset 'memory://elsewhere' is no finished pack: pack.index .* is missing"):
        Pack("memory://elsewhere", tmp_path)
    with pytest.raises(UserError, match="dataset 'sssh3://bucket/pack': Protocol not known: sssh3"):
        Pack("sssh3://bucket/pack", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be copied to .*data.cache_dir names another folder"):
        Pack(address, tmp_path / "file")


def test_a_server_that_fails_now_and_then(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Pack(address, tmp_path)
    kind = type(fsspec.filesystem("memory"))
    cat_file, answers = kind.cat_file, [OSError("try later"), RuntimeError("no"), None]

    def fail(self: Any, *args: Any, **options: Any) -> bytes:
        error = answers.pop(0)
        if error is not None:
            raise error
        return cat_file(self, *args, **options)

    monkeypatch.setattr(kind, "cat_file", fail)
    assert len(pack.read(0, np.arange(2))) == 2
    answers[:] = [OSError("try later")] * 3
    with pytest.raises(
        DecodeError,
        match=r"shard-000000.tar of pack memory://packs/small cannot be read \(3 tries\): "
        "try later",
    ):
        pack.read(0, np.arange(2))


class _Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder, with ranges if it has them."""

    protocol_version = "HTTP/1.1"
    root: Path
    has_ranges = True

    def do_GET(self) -> None:  # noqa: N802
        self._answer(True)

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(False)

    def _answer(self, with_body: bool) -> None:
        file = self.root / self.path.strip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.has_ranges and asked:
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, type[_Handler]]]:
    pytest.importorskip("aiohttp")

    class Handler(_Handler):
        root = folder

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", Handler
        running.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_http(folder: Path, server: tuple[str, type[_Handler]], tmp_path: Path, num_workers: int) -> None:
    # Workers are forked from a process that has talked to the server.
    assert_same(batches(server[0], tmp_path, num_workers=num_workers), batches(folder, tmp_path))


def test_http_without_ranges(server: tuple[str, type[_Handler]], tmp_path: Path) -> None:
    server[1].has_ranges = False
    with pytest.raises(UserError, match="sends whole files where a part is asked for"):
        batches(server[0], tmp_path)
    with pytest.raises(UserError, match=r"is no finished pack: pack.index of pack .*/no is missing"):
        Pack(server[0] + "/no", tmp_path)
