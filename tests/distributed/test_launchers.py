"""Rank, world size and address from the environments of torchrun and srun."""

from __future__ import annotations

import pytest

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.distributed.launchers import Place, expand_hosts, find_place, is_first_here

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03,7-8]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2,1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
}


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place("torchrun", 3, 4, 1, "a", 29500, 2, restarts=2, store_exists=True)


def test_srun() -> None:
    assert find_place(SRUN) == Place("srun", 5, 7, 1, "gpu03", 10000 + 123458 % 20000, 2)


def test_srun_with_an_address_of_its_own() -> None:
    place = find_place(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert place is not None
    assert (place.host, place.port) == ("10.0.0.1", 4000)


def test_torchrun_started_by_srun() -> None:
    place = find_place(TORCHRUN | SRUN)
    assert place is not None
    assert (place.launcher, place.rank) == ("torchrun", 3)


def test_no_launcher() -> None:
    assert find_place({}) is None
    # The script of a batch job: rank 0 of 7, says SLURM, but srun has not been called.
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}) is None


@pytest.mark.parametrize(
    ("environment", "local"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "2"}, False),
        ({"SLURM_LOCALID": "1"}, True),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "a"}, True),
    ],
)
def test_one_process_a_machine_speaks(environment: dict[str, str], local: bool) -> None:
    assert is_first_here(environment) is local


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b-2,c.d", ["a", "b-2", "c.d"]),
        ("gpu[01-03,7]-a,login", ["gpu01-a", "gpu02-a", "gpu03-a", "gpu7-a", "login"]),
        ("n[8-10]", ["n8", "n9", "n10"]),
        ("r[1-2]n[0,5]", ["r1n0", "r1n5", "r2n0", "r2n5"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE .*LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, r"\bRANK\b.*WORLD_SIZE\b.*\b4 and 4\b.*\b0 to 3\b"),
        (TORCHRUN | {"RANK": "x"}, "RANK .*'x'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, r"MASTER_PORT\b.* 70000\b.* 65535\b"),
        (SRUN | {"SLURM_PROCID": "7"}, r"SLURM_PROCID\b.*\b7 and 7\b"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[1-"}, r"SLURM_STEP_NODELIST is 'gpu\[1-'"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[a]"}, r"SLURM_STEP_NODELIST holds 'gpu\[a\]'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_STEP_TASKS_PER_NODE holds 'four'"),
        (SRUN | {"SLURM_NODEID": "3"}, r"SLURM_NODEID\b.*\b3\b.*\b3 machines"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_place(change)


def test_tasks_of_several_machines_alike() -> None:
    for node, tasks in enumerate((4, 4, 3)):
        place = find_place(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(node)})
        assert place is not None
        assert place.local_world_size == tasks
