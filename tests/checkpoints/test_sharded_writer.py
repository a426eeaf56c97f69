"""Checkpoints that are folders of shards: the same contents, damage that is named, full disks, hostile files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as torch_dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from typer.testing import CliRunner

import vjepa_fast as vf
from tests.e2e.harness import equal, no_leftovers
from tests.helpers.tiny import tiny_config
from vjepa_fast.checkpoints import sharded_format
from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import UserError
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHARDED = "train.checkpoint_format=sharded"
ONE = (SHARDED, "train.max_steps=6", "train.save_every_freq=1", "optimization.ipe=3")


@pytest.fixture(scope="module")
def trained(video_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process with checkpoints of steps 3 and 6, and of both epochs for good."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run").mkdir()
    Trainer(tiny_config(video_csv, folder / "cache", *ONE), folder=folder / "run").fit()
    names = sorted(path.name for path in (folder / "run").glob("*.dcp"))
    assert names == ["e0.dcp", "e1.dcp", "step3.dcp", "step6.dcp"]
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_opens_everywhere(run: Path, make: Make, tmp_path: Path) -> None:
    trained = make(*ONE, resume=True).model
    for path in (run, run / "step6.dcp"):
        model = vf.load(path)
        for name, value in model.encoder.state_dict().items():
            assert torch.equal(value, trained.target_encoder.state_dict()[name])
    result = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "out.pt"), "--to", "meta"])
    assert result.exit_code == 0 and "equal to the bit" in result.output, result.output
    # What torch's own converter makes of it is the same.
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run / "step6.dcp", tmp_path / "torch.pt")
    plain = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert equal(plain, sharded_format.split(sharded_format.Folder(run / "step6.dcp").contents())[1])


def test_same_contents_as_the_single_file(trained: Path, make: Make, tmp_path: Path) -> None:
    sharded_writer = sharded_format.Folder(trained / "step6.dcp").contents()
    make(*ONE[1:], "train.checkpoint_format=meta").fit()
    single = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    for contents in (sharded_writer, single):
        config = contents["vjepa_fast"]["config"]
        del config["train"]["checkpoint_format"], config["data"]["cache_dir"]
    assert equal(sharded_writer, single)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


@pytest.mark.parametrize(
    "change, name, said",
    [
        (flip, "__0_0.distcp", r"checksum\b.* __0_0\.distcp"),
        (cut, "__0_0.distcp", r"__0_0\.distcp\b.* \d+ bytes\b.* \d+"),
        (flip, ".metadata", r"checksum\b.* \.metadata"),
        (flip, "run.pt", r"checksum\b.* run\.pt"),
        (Path.unlink, "__0_0.distcp", r"__0_0\.distcp\b.* gone\b"),
        (cut, "manifest.json", r"manifest\.json\b.* damaged\b"),
        (Path.unlink, "manifest.json", r"\bno manifest\.json"),
    ],
)
def test_damage_is_named_and_the_newest_whole_one_taken(
    change: Callable[[Path], None], name: str, said: str, run: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run / "step6.dcp" / name)
    with pytest.raises(UserError, match=rf"step6\.dcp\b.*{said}.*step3\b"):
        vf.load(run)
    cfg = ("train.read_checkpoint=" + str(run / "step6.dcp"), "train.out=" + str(run.parent / "other"))
    with pytest.raises(UserError, match=rf"step6\.dcp\b.*{said}"):
        Trainer(make(*ONE, *cfg).cfg)
    shutil.rmtree(run / "e1.dcp")
    capsys.readouterr()
    assert make(*ONE, resume=True).step == 3
    told = capsys.readouterr().out
    assert re.search(r"step6\.dcp\b.*step3\.dcp\b", told, re.S)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def rewrite_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    """With a manifest that agrees, as somebody would who means harm."""
    metadata = torch_dcp.FileSystemReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = sharded_format.Entry.of(folder / ".metadata")
    manifest["files"][".metadata"] = {"size": entry.size, "crc32": f"{entry.crc:08x}"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def runs_code(metadata: Any) -> Any:
    metadata.planner_data = Evil()
    return metadata


def holds_an_object(metadata: Any) -> Any:
    metadata.state_dict_metadata["encoder.norm.bias"] = BytesStorageMetadata()
    return metadata


def points_elsewhere(metadata: Any) -> Any:
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"
    return metadata


@pytest.mark.parametrize("change", [runs_code, holds_an_object, points_elsewhere, lambda metadata: {"a": 1}])
def test_nothing_of_a_hostile_folder_is_run(
    change: Callable[[Any], Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite_metadata(run / "step6.dcp", change)
    assert sharded_format.damage(run / "step6.dcp") is None
    with pytest.raises(UserError, match=r"step6\.dcp\b.*metadata\b"):
        vf.load(run / "step6.dcp")
    assert not (tmp_path / "ran").exists()


def test_a_hostile_run_pt_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": Evil()}, run / "step6.dcp" / "run.pt")
    with pytest.raises(UserError, match=r"run\.pt\b"):
        sharded_format.Folder(run / "step6.dcp")
    assert not (tmp_path / "ran").exists()


def test_another_model_is_refused(run: Path, make: Make) -> None:
    with pytest.raises(UserError, match="encoder.*not fit"):
        make(*ONE, "model.embed_dim=48", resume=True)


@pytest.mark.parametrize(
    "name, background",
    [("__0_0.distcp", "false"), ("__0_0.distcp", "true"), ("run.pt", "false"), ("manifest.json", "true")],
)
def test_a_full_disk_leaves_the_one_before(
    name: str, background: str, run: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("step6.dcp", "e0.dcp", "e1.dcp"):
        shutil.rmtree(run / other)
    going = make(*ONE, "train.keep_last=1", f"train.async_checkpoint={background}", resume=True)
    save, write_text, calls = torch.save, Path.write_text, []

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        is_rest = isinstance(value, dict)
        calls.append(is_rest)
        if is_rest if name == "run.pt" else name == "__0_0.distcp" and len(calls) > 20:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, file, *args, **kwargs)

    def full_text(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(Path, "write_text", full_text)
    with pytest.raises(UserError, match=r"/step6\.dcp: .*\bfull\b.*--resume\b.*\bintact\b"):
        going.fit()
    monkeypatch.undo()
    assert sharded_format.damage(tmp_path / "run" / "step3.dcp") is None and no_leftovers(tmp_path / "run")
    again = make(*ONE, "train.keep_last=1", resume=True)
    assert again.step == 3 and again.fit().step == 6
    assert [path.name for path in (tmp_path / "run").glob("step*")] == ["step6.dcp"]


def test_training_goes_on_while_it_is_written(
    trained: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was there, though the weights have moved on."""
    reference = sharded_format.Folder(trained / "step3.dcp").contents()
    gate, finish = threading.Event(), sharded_format.manifest_text
    from vjepa_fast.checkpoints import sharded_writer

    def held(*args: Any) -> str:
        assert gate.wait(60)
        return finish(*args)

    monkeypatch.setattr(sharded_writer, "manifest_text", held)
    trainer = make(*ONE, "train.async_checkpoint=true")
    original = trainer.run_step

    def run_step(batch):  # type: ignore[no-untyped-def]
        if trainer.step == 5:
            assert not (tmp_path / "run" / "step3.dcp").exists()
            gate.set()
        return original(batch)

    trainer.run_step = run_step  # type: ignore[method-assign]
    trainer.fit()
    written = sharded_format.Folder(tmp_path / "run" / "step3.dcp").contents()
    for contents in (reference, written):
        del contents["vjepa_fast"]["config"]
    assert equal(reference, written)
