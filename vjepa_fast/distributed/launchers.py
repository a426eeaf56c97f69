"""Reads this process's rank from torchrun's or srun's environment.

Both say it in environment variables: torchrun RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, srun
SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID and SLURM_STEP_NODELIST. Where both are there, torchrun was started by
srun and counts. Imports no torch, so that the command line can ask before anything slow happens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vjepa_fast.common.errors import ConfigError

_FIRST_PORT, _NUM_PORTS = 10_000, 20_000
"""Ports of SLURM jobs: below those that Linux hands out by itself, which begin at 32768."""


@dataclass(frozen=True)
class Place:
    """One process among those of a run."""

    launcher: str
    """torchrun or srun, for messages."""
    rank: int
    """0 to world_size - 1."""
    world_size: int
    local_rank: int
    """Rank among the processes of this machine."""
    host: str
    """Machine of rank 0: a name or an address."""
    port: int
    """Where rank 0 (or torchrun) listens on it."""
    local_world_size: int
    """Processes on this machine."""
    restarts: int = 0
    """How often torchrun has started the processes again."""
    store_exists: bool = False
    """torchrun listens on the port; else rank 0 has to."""


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None where neither torchrun nor srun started it.

    Raises:
        ConfigError: variables are missing or contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _of_torchrun(environment)
    # The script of a batch job has most of SLURM's variables too, but is no step of the job.
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return _of_srun(environment)
    return None


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for its machine before the processes have found each other."""
    local_rank = environment.get("LOCAL_RANK")
    if local_rank is None and "SLURM_STEP_NODELIST" in environment:
        local_rank = environment.get("SLURM_LOCALID")
    return local_rank in (None, "0")


def expand_hosts(text: str) -> list[str]:
    """The host names of a SLURM list: `gpu[01-03,7]-a,login` is gpu01-a, gpu02-a, gpu03-a, gpu7-a, login.

    Raises:
        ConfigError: not such a list.
    """
    if text.count("[") != text.count("]") or not re.fullmatch(r"[^\s]+", text):
        raise ConfigError(f"SLURM_STEP_NODELIST is {text!r}; expected host names such as gpu[01-03],login")
    # Commas inside of brackets separate numbers.
    return [name for part in re.split(r",(?![^\[]*\])", text) for name in _expand(part)]


def _expand(pattern: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", pattern)
    if found is None:
        return [pattern]
    before, numbers, after = found.groups()
    middles: list[str] = []
    for item in numbers.split(","):
        low, _, high = item.partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise ConfigError(f"SLURM_STEP_NODELIST holds {pattern!r}; expected numbers in brackets, as in gpu[01-03]")
        middles += [str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1)]
    return [before + middle + rest for middle in middles for rest in _expand(after)]


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        there = [name for name in needed if name in environment]
        raise ConfigError(
            f"the environment has {', '.join(there)} but not {', '.join(missing)}; start the processes "
            "with torchrun or srun, which set all of them, or unset what is left of an earlier launch"
        )
    return _checked(
        Place(
            "torchrun",
            _number(environment, "RANK"),
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_RANK"),
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
            _number(environment, "LOCAL_WORLD_SIZE", 1),
            _number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )


def _of_srun(environment: Mapping[str, str]) -> Place:
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    return _checked(
        Place(
            "srun",
            _number(environment, "SLURM_PROCID"),
            _number(environment, size),
            _number(environment, "SLURM_LOCALID"),
            environment.get("MASTER_ADDR", hosts[0]),
            _number(environment, "MASTER_PORT", _FIRST_PORT + (job + step) % _NUM_PORTS),
            _tasks_here(environment, len(hosts)),
        )
    )


def _tasks_here(environment: Mapping[str, str], num_hosts: int) -> int:
    """`4(x2),3` is 4, 4 and 3 tasks on three machines."""
    counts: list[int] = []
    for item in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if found is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE holds {item!r}; expected counts such as 4(x2),3")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    if node >= max(len(counts), num_hosts):
        raise ConfigError(f"SLURM_NODEID is {node}, but the step has {num_hosts} machines")
    return counts[min(node, len(counts) - 1)]


def _checked(place: Place) -> Place:
    if not place.rank < place.world_size:
        names = "RANK and WORLD_SIZE" if place.launcher == "torchrun" else "SLURM_PROCID and the number of tasks"
        raise ConfigError(
            f"{names} are {place.rank} and {place.world_size}; expected a rank from 0 to {max(0, place.world_size - 1)}"
        )
    if not 0 < place.port < 65536:
        raise ConfigError(f"MASTER_PORT is {place.port}; expected a port from 1 to 65535")
    return place


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ConfigError(f"{name} is {'not set' if text is None else repr(text)}; expected a number from 0")
    return int(text)
