"""Processes that do not find each other say why, soon; run folders of launches that start again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny import tiny_config
from vjepa_fast.checkpoints.run_folder import LAUNCHED_BY, choose_folder_of_launch
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.distributed.launchers import Place
from vjepa_fast.distributed.rendezvous import connect
from vjepa_fast.train import launch_run


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is taken."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield taken.getsockname()[1]


def place(rank: int, port: int, host: str = "127.0.0.1") -> Place:
    return Place("srun", rank, 2, rank, host, port, 2)


def test_port_in_use(port: int) -> None:
    with pytest.raises(UserError, match=f"port {port}.*in use.*MASTER_PORT"):
        connect(place(0, port), 1.0)


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("", 0))
        return int(some.getsockname()[1])


def test_process_that_does_not_come() -> None:
    with pytest.raises(UserError, match=r"\b2 processes.*127\.0\.0\.1:.*\b1 s\b"):
        connect(place(0, free_port()), 1.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_host_that_does_not_answer(host: str) -> None:
    with pytest.raises(UserError, match=rf"process 1 of 2.*{host}:.*\b1 s\b"):
        connect(place(1, free_port(), host), 1.0)


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "list.csv", tmp_path)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"global_batch_size=4.*\b3\b.*processes"):
        launch_run.run(cfg)
    with pytest.raises(ConfigError, match=r"--nproc.*\b2\b.*torchrun.*\b3\b"):
        launch_run.run(cfg, nproc=2)


def test_folder_of_a_launch_that_starts_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(tmp_path / "list.csv", tmp_path)
    earlier, resume = choose_folder_of_launch(cfg, False, "torchrun a 1", False)
    assert not resume
    (earlier / "latest.pt").touch()
    first, _ = choose_folder_of_launch(cfg, False, "torchrun a 2", False)
    assert first != earlier
    # It died before its first checkpoint: what goes on is this run, not the earlier one.
    assert choose_folder_of_launch(cfg, False, "torchrun a 2", True) == (first, True)
    # In a container the launcher of a later run may have the number of an earlier one.
    for number, folder in enumerate((first, earlier), start=1):
        (folder / LAUNCHED_BY).write_text("torchrun a 2\n")
        os.utime(folder / LAUNCHED_BY, (number, number))
    assert choose_folder_of_launch(cfg, False, "torchrun a 2", True) == (earlier, True)
    os.utime(first / LAUNCHED_BY, (3, 3))
    assert choose_folder_of_launch(cfg, False, "torchrun a 2", True) == (first, True)
    # It died before it had a folder.
    third, resume = choose_folder_of_launch(cfg, False, "torchrun a 3", True)
    assert third not in (first, earlier)
    assert not resume


def test_named_folder_of_a_launch_that_starts_again(tmp_path: Path) -> None:
    """On other machines than before, perhaps: the folder is the same, so the run goes on."""
    cfg = tiny_config(tmp_path / "list.csv", tmp_path, f"train.out={tmp_path}/run")
    choose_folder_of_launch(cfg, False, "torchrun a 1", False)
    (tmp_path / "run" / "latest.pt").touch()
    assert choose_folder_of_launch(cfg, False, "torchrun b 1", True) == (tmp_path / "run", True)
    with pytest.raises(ConfigError, match="already holds a run"):
        choose_folder_of_launch(cfg, False, "torchrun b 1", False)
