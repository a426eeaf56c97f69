"""Which folder a run gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import tiny_config
from vjepa_fast.checkpoints.run_folder import choose_folder
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.train import launch_run


def chosen(*changes: str, resume: bool = False) -> Path:
    return choose_folder(tiny_config(Path("a.csv"), Path("cache"), *changes), resume)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_no_run_is_overwritten() -> None:
    names = ["train.name=x"]
    assert chosen(*names) == Path("runs/x")
    assert chosen(*names) == Path("runs/x-2")
    (Path("runs/x") / "latest.pt").touch()
    assert chosen(*names) == Path("runs/x-3")
    assert chosen(*names, resume=True) == Path("runs/x")
    (Path("runs/x-2") / "latest.pt").touch()
    assert chosen(*names, resume=True) == Path("runs/x-2")
    assert chosen(*names, "train.auto_resume=true") == Path("runs/x-2")


def test_named_folder() -> None:
    assert chosen("train.out=mine", resume=True) == Path("mine")
    (Path("mine") / "latest.pt").touch()
    assert chosen("train.out=mine", resume=True) == Path("mine")
    with pytest.raises(ConfigError, match="mine.*--resume"):
        chosen("train.out=mine")


def test_a_file_is_in_the_way() -> None:
    Path("mine").touch()
    with pytest.raises(UserError, match=r"\bmine\b.*File exists"):
        chosen("train.out=mine")


def test_a_run_that_never_began_leaves_nothing() -> None:
    for changes in ([], ["train.out=mine"]):
        with pytest.raises(UserError, match=r"a\.csv"):
            launch_run.run(tiny_config(Path("a.csv"), Path("cache"), *changes))
    assert not list(Path("runs").iterdir()) and not Path("mine").exists()
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    with pytest.raises(UserError, match=r"a\.csv"):
        launch_run.run(tiny_config(Path("a.csv"), Path("cache"), "train.out=mine"))
    assert Path("mine/notes.txt").exists()
