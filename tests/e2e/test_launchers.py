"""Runs that srun and torchrun start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import Runner, hang_at, losses, no_leftovers, signal_in_step, start_tasks


def test_srun(runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """One of two tasks is asked to end: both do, after a checkpoint, and the run goes on as one of one process."""
    out = tmp_path / "run"
    arguments = ("--config", config, "--out", out, "--resume", "--max-steps", 12)
    first, second = start_tasks(runner, *arguments, patches=[(signal_in_step, (4, signal.SIGTERM))])
    assert (first.wait(), second.wait()) == (143, 143), first.stderr + second.stderr
    assert "2 processes" in first.stdout and "ended by SIGTERM at step 5" in first.stdout
    assert second.stdout == second.stderr == first.stderr == ""
    first, second = start_tasks(runner, *arguments)
    assert (first.wait(), second.wait()) == (0, 0), first.stderr + second.stderr
    assert "at step 5\n" in first.stdout
    assert second.stdout == second.stderr == ""
    pairs = zip(losses(out), losses(uninterrupted)[:12], strict=True)
    assert all(abs(float(a) - float(b)) <= 1e-6 for a, b in pairs)
    assert no_leftovers(out)


def test_failure_of_one_task_is_told_once(runner: Runner, config: Path, tmp_path: Path) -> None:
    lines = (tmp_path / "list.csv").read_text().splitlines()
    lines = [line if index % 4 < 2 else f"gone{index}.mp4 0" for index, line in enumerate(lines)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    first, second = start_tasks(runner, "--config", config, "--out", tmp_path / "run", "--max-steps", 30)
    assert (first.wait(), second.wait()) == (1, 1)
    said = first.stderr + second.stderr
    assert said.startswith("error: process 1 of 2: more than data.max_broken=0.1")
    assert said.count("error:") == 1 and "Traceback" not in said


def test_task_that_is_killed(runner: Runner, config: Path, tmp_path: Path) -> None:
    """The other says what it knows, and ends."""
    first, second = start_tasks(
        runner, "--config", config, "--out", tmp_path / "run", patches=[(signal_in_step, (4, signal.SIGKILL))]
    )
    assert (first.wait(), second.wait()) == (1, -signal.SIGKILL)
    assert first.stderr == (
        "error: process 0 of 2: the connection to another process is lost; most likely it was "
        "killed, and its own output says more. Continue with --resume\n"
    )


def test_process_that_hangs_is_named(runner: Runner, config: Path, tmp_path: Path) -> None:
    """All stacks are shown, the error once."""
    first, second = start_tasks(
        runner, "--config", config, "--out", tmp_path / "run", "train.watchdog=4", patches=[(hang_at, (4,))]
    )
    assert (first.wait(), second.wait()) == (1, 1)
    said = first.stderr + second.stderr
    assert said.count("error:") == 1
    assert (
        "no progress for 4 s (train.watchdog): stuck at step 4, waiting for clips: process 1 of 2, for which the "
        "others wait. The stacks are above; continue with --resume"
    ) in said
    assert "process 0 of 2 has been at step 4, waiting for the other processes, for" in first.stderr
    assert "largest" in first.stderr and "time.sleep(1)" in second.stderr
    assert "Traceback" not in said


def torchrun(config: Path, out: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "--monitor-interval",
        "0.1",
        "-m",
        "tests.e2e.elastic_worker",
        "train",
        "--config",
        str(config),
        "--out",
        str(out),
        "--max-steps",
        "9",
        *argv,
    ]
    variables = {**os.environ, "PYTHONPATH": os.getcwd(), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_torchrun_starts_a_killed_run_again(runner: Runner, config: Path, tmp_path: Path) -> None:
    """By itself, at the last checkpoint; then the losses are those of a run that nobody killed, to the bit."""
    killed = torchrun(config, tmp_path / "killed", KILL_AT="4")
    assert killed.returncode == 0, killed.stderr
    assert "at step 3\n" in killed.stdout
    assert "finished at step 9" in killed.stdout
    first, second = start_tasks(runner, "--config", config, "--out", tmp_path / "whole", "--max-steps", 9)
    assert (first.wait(), second.wait()) == (0, 0), first.stderr + second.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
