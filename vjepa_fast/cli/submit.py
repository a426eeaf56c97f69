"""Submits training as a SLURM job through submitit (the extra `slurm`).

A job that is about to reach its time limit gets SIGUSR2 from SLURM: the run finishes its step and writes a checkpoint,
then submitit puts the job back into the queue, where it goes on from that checkpoint. SIGTERM is taken as ever: a
checkpoint, and the end; SLURM itself requeues a job that it has preempted. Either way the job, when it starts again,
continues what its run folder holds.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed.signals import EXIT_CODES, STOP_SIGNALS

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

CLUSTERS = ("slurm", "local")
NUMBERS = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb", "timeout_min", "signal_delay_s")
TEXTS = ("cluster", "partition", "account", "qos", "constraint", "exclude", "nodelist", "dependency", "name", "comment")

SIGNAL_DELAY = 300
"""Seconds before the time limit at which a job is told to write a checkpoint, where `signal_delay_s` is not given."""

MAX_TIMEOUTS = 10_000
"""How often a job may reach its time limit and go on: a long run does so many times."""

_FOREVER = 60 * 24 * 365
"""Minutes; of a job without a cluster."""


def parse(text: str) -> dict[str, str | int]:
    """`partition=gpu,nodes=2,timeout_min=1440` as a dictionary; commas inside of brackets belong to a value.

    Raises:
        ConfigError: an unknown key, a value that is no number where one is needed, or no time limit.
    """
    found: dict[str, str | int] = {}
    for item in re.split(r",(?![^\[]*\])", text):
        key, equals, value = item.strip().partition("=")
        if not equals or not value:
            raise ConfigError(
                f"--submit has {item!r}; expected key=value, separated by commas, as in "
                "partition=gpu,nodes=2,gpus_per_node=8,timeout_min=1440"
            )
        if key not in NUMBERS + TEXTS:
            near = get_close_matches(key, NUMBERS + TEXTS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"--submit has {key!r}; {hint}known keys are {', '.join(NUMBERS + TEXTS)}")
        if key in NUMBERS:
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--submit has {key}={value}; expected a whole number from 1")
            found[key] = int(value)
        else:
            found[key] = value
    cluster = found.get("cluster", "slurm")
    if cluster not in CLUSTERS:
        raise ConfigError(f"--submit has cluster={cluster}; expected {' or '.join(CLUSTERS)}")
    if cluster == "local" and int(found.get("nodes", 1)) > 1:
        raise ConfigError(
            "--submit has nodes together with cluster=local, which is this machine alone; leave nodes out"
        )
    if cluster == "slurm" and "timeout_min" not in found:
        raise ConfigError(
            "--submit has no timeout_min, the time limit of the job in minutes; a run that needs "
            "longer goes back into the queue then"
        )
    return found


def num_processes(options: dict[str, str | int]) -> int:
    """Training processes of a job, one for each GPU unless tasks_per_node says otherwise."""
    return int(options.get("nodes", 1)) * _tasks_per_node(options)


def _tasks_per_node(options: dict[str, str | int]) -> int:
    return int(options.get("tasks_per_node", options.get("gpus_per_node", 1)))


def submit(cfg: Config, options: dict[str, str | int], resume: bool, profile: bool = False) -> tuple[Job[int], Path]:
    """Put a run into the queue.

    Args:
        cfg: of the run.
        options: as `parse` gives them.
        resume, profile: as Trainer.

    Returns:
        The job, and its run folder.

    Raises:
        ConfigError, UserError: submitit or SLURM is not here, the batch does not divide by the processes, or SLURM does
            not take the job.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--submit needs submitit, which is not installed: pip install 'vjepa-fast[slurm]'") from None
    # Needs torch, for a moment.
    from vjepa_fast.checkpoints.run_folder import choose_folder

    is_local = options.get("cluster") == "local"
    missing = [] if is_local else [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--submit finds no {' and no '.join(missing)}; run it where SLURM's commands are, or add "
            "cluster=local to run the job on this machine"
        )
    count = num_processes(options)
    try:
        cfg.data.per_process(count)
    except ValueError as error:
        raise ConfigError(f"{error} (--submit); use another number or batch size") from error
    folder = choose_folder(cfg, resume).absolute()
    cfg = cfg.model_copy(deep=True)
    # The same folder at every start.
    cfg.train.out = folder
    logs = folder / "jobs"
    if is_local:
        local = submitit.LocalExecutor(logs, max_num_timeout=MAX_TIMEOUTS)
        local.update_parameters(
            timeout_min=options.get("timeout_min", _FOREVER),
            gpus_per_node=options.get("gpus_per_node", 0),
            signal_delay_s=options.get("signal_delay_s", SIGNAL_DELAY),
        )
        # One task, which starts the others as --nproc does.
        job: Job[int] = local.submit(TrainingJob(cfg, count, profile))
        return job, folder
    executor = submitit.SlurmExecutor(logs, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**slurm_parameters(cfg, options))
    try:
        return executor.submit(TrainingJob(cfg, 1, profile)), folder
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM did not take the job: {error}") from error


def slurm_parameters(cfg: Config, options: dict[str, str | int]) -> dict[str, Any]:
    """What submitit's executor for SLURM is given."""
    renamed = {"timeout_min": "time", "name": "job_name"}
    given = {renamed.get(key, key): value for key, value in options.items() if key not in ("cluster", "mem_gb")}
    if "mem_gb" in options:
        given["mem"] = f"{options['mem_gb']}GB"
    given.pop("tasks_per_node", None)
    # A task that dies must not leave the others waiting; a job that is preempted comes back.
    return {
        "job_name": cfg.train.name,
        "signal_delay_s": SIGNAL_DELAY,
        **given,
        "ntasks_per_node": _tasks_per_node(options),
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True},
    }


class TrainingJob:
    """What a job runs, in each of its tasks: a run that goes on from whatever its folder holds.

    Args:
        cfg: of the run; train.out is its folder.
        nproc: processes that this task starts; 1 where SLURM starts them.
        profile: as Trainer.
    """

    def __init__(self, cfg: Config, nproc: int, profile: bool) -> None:
        self.cfg, self.nproc, self.profile = cfg, nproc, profile
        self._is_ending = False

    def __call__(self) -> int:
        """Train. Returns 0, or ends the process with the exit code of `vjepa-fast train`, or as submitit requeues."""
        # submitit lets SIGTERM pass; held back until training takes it over.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        requeue = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, self._end)
        # As the command line does, before torch is there.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from vjepa_fast.cli.console import say
        from vjepa_fast.evaluation.demo import probe_run
        from vjepa_fast.train import launch_run

        try:
            code = launch_run.run(self.cfg, nproc=self.nproc, resume=True, profile=self.profile, finish=probe_run)
        except UserError as error:
            say("error", str(error))
            sys.exit(error.exit_code)
        if self._is_ending and code == EXIT_CODES[signal.SIGTERM] and callable(requeue):
            # Of the first task only; it ends the process.
            requeue(signal.SIGUSR2, None)
        if code:
            sys.exit(code)
        return code

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._is_ending = True
        os.kill(os.getpid(), signal.SIGTERM)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit is to run when the job starts again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(TrainingJob(self.cfg, self.nproc, self.profile))
