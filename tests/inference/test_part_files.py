"""Tensors in files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vjepa_fast.common.errors import UserError
from vjepa_fast.inference import part_files
from vjepa_fast.inference.part_files import PartFiles


def made(folder: Path) -> tuple[PartFiles, list[Path]]:
    parts: list[Path] = []
    return PartFiles(lambda: folder / f"{len(parts)}.safetensors", parts.append), parts


def test_everything_is_there_after_a_flush(tmp_path: Path) -> None:
    files, parts = made(tmp_path)
    kept = torch.arange(12.0).view(3, 4)
    files.keep("turned", kept.T)
    files.keep("row", kept[1])
    kept.zero_()
    assert not parts and not list(tmp_path.iterdir())
    files.flush()
    files.flush()
    assert parts == list(tmp_path.iterdir()) == [tmp_path / "0.safetensors"]
    found = load_file(parts[0])
    assert torch.equal(found["turned"], torch.arange(12.0).view(3, 4).T)
    assert torch.equal(found["row"], torch.arange(4.0, 8.0))


@pytest.mark.parametrize(("limit", "value"), [("_SECONDS", 0.0), ("_BYTES", 16)])
def test_a_part_is_written_when_enough_waits(
    limit: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_files, limit, value)
    files, parts = made(tmp_path)
    for number in range(3):
        files.keep(str(number), torch.zeros(2, 2))
    assert [list(load_file(part)) for part in parts] == [["0"], ["1"], ["2"]]


def test_small_tensors_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "_BYTES", 24)
    files, parts = made(tmp_path)
    for number in range(5):
        files.keep(str(number), torch.zeros(2))
    assert [len(load_file(part)) for part in parts] == [3]


def test_a_full_disk_keeps_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    files, parts = made(tmp_path)
    files.keep("a", torch.zeros(2))
    with monkeypatch.context() as patched:
        patched.setattr(part_files, "save_file", full)
        with pytest.raises(UserError, match="the disk is full; .* what is done is kept"):
            files.flush()
    assert not parts and not list(tmp_path.iterdir())
    files.flush()
    assert list(load_file(parts[0])) == ["a"]
