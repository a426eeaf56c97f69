"""Joins the processes that torchrun or srun has started into one run."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.workers import available_cores
from vjepa_fast.distributed.launchers import Place
from vjepa_fast.distributed.processes import Failure, leave, only_this_machine, start_group, tell_failures_by


def connect(place: Place, seconds: float) -> dist.TCPStore:
    """The store through which the processes find each other.

    Args:
        place: of this process.
        seconds: how long to wait for the others.

    Raises:
        UserError: the port is taken, nobody answers there, or processes are missing.
    """
    holds = place.rank == 0 and not place.store_exists
    where = f"{place.host}:{place.port}"
    try:
        return dist.TCPStore(
            place.host,
            place.port,
            None if place.store_exists else place.world_size,
            is_master=holds,
            timeout=timedelta(seconds=seconds),
            multi_tenant=holds,
        )
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text:
            raise UserError(
                f"port {place.port} of {socket.gethostname()} is in use by another program; set "
                "MASTER_PORT to a free one, the same for all processes"
            ) from error
        if holds:
            raise UserError(
                f"not all {place.world_size} processes came to {where} within {seconds:g} s. Look at the output of the "
                "others, and whether as many were started; train.connect_timeout sets the time"
            ) from error
        raise UserError(
            f"process {place.rank} of {place.world_size} got no answer from {where} within {seconds:g} s. The first "
            "process has to run there: check MASTER_ADDR and MASTER_PORT, and that no firewall is between; "
            "train.connect_timeout sets the time"
        ) from error


def join(main: Callable[[int], int], place: Place, seconds: float) -> int:
    """Run `main(rank)` as one of the processes; all other processes of the run have to do the same.

    The process that fails first says why and ends at once with its exit code; the others, which fail because of it,
    end without a word.

    Args:
        place: of this process.
        seconds: as connect.

    Returns:
        The exit code that `main` returned.

    Raises:
        UserError: as connect.
    """
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(_sharers(place)),
    )
    if place.world_size == 1:
        return main(0)
    if place.local_world_size == place.world_size:
        only_this_machine()
    store = connect(place, seconds)
    failures = dist.PrefixStore(f"vjepa_fast/failure/{place.restarts}", store)

    def tell(failure: Failure) -> None:
        if failure.claim(failures):
            who = f"error: process {place.rank} of {place.world_size}: "
            text = f"{who}{failure.text}" if failure.user_error else f"{failure.text}{who}failed as shown above"
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    tell_failures_by(tell)
    try:
        # torchrun's store may be that of the processes before a restart.
        start_group(dist.PrefixStore(f"vjepa_fast/{place.restarts}", store), place.rank, place.world_size)
        code = main(place.rank)
        dist.destroy_process_group()
        return code
    except BaseException as error:
        leave(place.rank, error)


def _sharers(place: Place) -> int:
    """Processes that share the cores this one may use."""
    # srun gives each task its own cores, or all of them all.
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    bound = place.launcher == "srun" and per_task.isdigit() and available_cores() <= int(per_task)
    return 1 if bound else place.local_world_size
