"""Runs training for the command line: in this process, in child processes, or as one process of torchrun or srun."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vjepa_fast.checkpoints.run_folder import choose_folder, choose_folder_of_launch
from vjepa_fast.common.atomic import remove_leftovers
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed.launchers import Place, find_place
from vjepa_fast.distributed.processes import launch
from vjepa_fast.distributed.rendezvous import join
from vjepa_fast.distributed.signals import StopSignals
from vjepa_fast.train.trainer import Trainer

Finish = Callable[[Trainer], None]


def run(cfg: Config, nproc: int = 1, resume: bool = False, profile: bool = False, finish: Finish | None = None) -> int:
    """Train as the command line does.

    Args:
        cfg: what to do.
        nproc: processes on this machine.
        resume, profile: as Trainer.
        finish: as Trainer.fit; sent to the processes that are started.

    Returns:
        Exit code: 0 done, 130 interrupted, 143 ended by SIGTERM.

    Raises:
        ConfigError, UserError: as Trainer and Trainer.fit.
        KeyboardInterrupt: a second Ctrl-C.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc is {nproc}; expected a positive number")
    place = find_place()
    if place is not None and place.world_size == 1 and place.launcher == "srun":
        # A step of one task, which may start processes of its own.
        place = None
    if place is not None and nproc > 1:
        raise ConfigError(
            f"--nproc is {nproc}, but {place.launcher} has started this process as one of "
            f"{place.world_size}; leave --nproc out"
        )
    num_processes = nproc if place is None else place.world_size
    try:
        cfg.data.per_process(num_processes)
    except ValueError as error:
        what = "--nproc" if place is None else "number of processes"
        raise ConfigError(f"{error}; use another {what} or batch size") from error
    if place is not None:
        return join(
            partial(_run_joined, cfg=cfg, resume=resume, profile=profile, finish=finish, place=place),
            place,
            cfg.train.connect_timeout,
        )
    folder = choose_folder(cfg, resume)
    try:
        if nproc == 1:
            stop = StopSignals()
            stop.install()
            return _train(cfg, resume, profile, finish, folder, stop)
        return launch(
            partial(_run_process, cfg=cfg, resume=resume, profile=profile, finish=finish, folder=folder), nproc
        )
    finally:
        # A process that was killed in the middle of writing a file leaves it.
        remove_leftovers(folder)
        # A run that never began, as of a misspelt dataset, leaves no folder; one with files in it stays.
        with contextlib.suppress(OSError):
            folder.rmdir()


def _run_process(_: int, cfg: Config, resume: bool, profile: bool, finish: Finish | None, folder: Path) -> int:
    # The parent says that it stops, and decides what a second Ctrl-C does.
    stop = StopSignals(second_leaves=False, verbose=False)
    stop.install()
    return _train(cfg, resume, profile, finish, folder, stop)


def _run_joined(rank: int, cfg: Config, resume: bool, profile: bool, finish: Finish | None, place: Place) -> int:
    # torchrun passes a Ctrl-C on that the terminal may have sent already.
    stop = StopSignals(second_leaves=False, verbose=rank == 0)
    stop.install()
    chosen: list[Any] = [None, resume]
    if rank == 0:
        # The launcher of this machine is the same process at every start.
        launched_by = f"{place.launcher} {socket.gethostname()} {os.getppid()}"
        chosen = list(choose_folder_of_launch(cfg, resume, launched_by, place.restarts > 0))
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, device=torch.device("cpu"))
    folder, resume = chosen
    return _train(cfg, resume, profile, finish, folder, stop)


def _train(cfg: Config, resume: bool, profile: bool, finish: Finish | None, folder: Path, stop: StopSignals) -> int:
    try:
        trainer = Trainer(cfg, resume=resume, profile=profile, folder=folder, stop=stop)
        return trainer.fit(finish).exit_code
    except OSError as error:
        raise UserError(
            f"cannot go on: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        ) from error
    finally:
        stop.restore()
