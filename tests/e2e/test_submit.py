"""`vjepa-fast train --submit`: submitit's executor for this machine runs the job for real."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Runner, losses, no_leftovers
from vjepa_fast.cli import submit
from vjepa_fast.config import load_config

submitit = pytest.importorskip("submitit")


def wait_for(job: submitit.Job) -> None:
    for _ in range(2400):
        if job.done():
            return
        time.sleep(0.05)
    raise AssertionError(f"the job is still running\n{job.stdout()}\n{job.stderr()}")


def test_a_job_whose_time_is_up_goes_on(
    runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR2 in step 4: a checkpoint, the queue again, and the losses are those of a run that nothing happened to."""
    from tests.e2e.ending_job import EndingJob

    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setattr(submit, "TrainingJob", EndingJob)
    out = tmp_path / "run"
    cfg = load_config(config, [f"train.out={out}", "train.max_steps=12"])
    job, folder = submit.submit(cfg, submit.parse("cluster=local"), resume=False)
    assert folder == out
    wait_for(job)
    said = job.stdout() or ""
    assert "ended by SIGTERM at step 5" in said and "at step 5\n" in said and "finished at step 12" in said, (
        said,
        job.stderr(),
    )
    assert job.result() == 0
    assert losses(out) == losses(uninterrupted)[:12]
    assert no_leftovers(out)


@pytest.mark.slow
def test_the_command_line(config: Path, tmp_path: Path) -> None:
    """A job of two processes."""
    out = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vjepa_fast",
            "train",
            "--config",
            str(config),
            "--out",
            str(out),
            "--max-steps",
            "6",
            "--submit",
            "cluster=local,tasks_per_node=2",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    number = done.stdout.split()[1]
    assert f"job {number} of 2 processes is submitted\nrun folder {out}\n" in done.stdout
    job: submitit.Job = submitit.LocalJob(out / "jobs", number)
    for _ in range(2400):
        if job.paths.result_pickle.exists():
            break
        time.sleep(0.05)
    assert job.result() == 0
    assert "2 processes" in job.stdout() and len(losses(out)) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition", "expected key=value, separated by commas"),
        ("partition=gpu,node=2,timeout_min=5", "--submit has 'node'; did you mean nodes?"),
        ("nodes=two,timeout_min=5", "--submit has nodes=two; expected a whole number from 1"),
        ("partition=gpu,nodes=2", "--submit has no timeout_min"),
        ("cluster=pbs", "--submit has cluster=pbs; expected slurm or local"),
        ("cluster=local,nodes=2", "this machine alone"),
        ("partition=gpu,timeout_min=5", "--submit finds no sbatch and no srun"),
    ],
)
def test_mistakes(text: str, said: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=said):
        submit.submit(load_config(config), submit.parse(text), resume=False)


def test_what_slurm_is_asked_for(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch that keeps its script."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\n/bin/cp "$1" {tmp_path}/script.sh\necho Submitted batch job 17\n')
    (tmp_path / "srun").write_text("")
    for name in ("sbatch", "srun"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = submit.parse("partition=gpu,nodes=2,gpus_per_node=2,timeout_min=90,exclude=a[1,3],mem_gb=64")
    job, _ = submit.submit(load_config(config, [f"train.out={tmp_path}/run"]), options, resume=False)
    assert job.job_id == "17"
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "--partition=gpu",
        "--nodes=2",
        "--gpus-per-node=2",
        "--ntasks-per-node=2",
        "--time=90",
        "--mem=64GB",
        "--exclude='a[1,3]'",
        "--signal=USR2@300",
        "--requeue",
        "--open-mode=append",
        "--job-name=run",
    ):
        assert f"#SBATCH {line}\n" in script, script
    assert "--kill-on-bad-exit=1" in script
    with pytest.raises(ValueError, match="is not a multiple of 3 processes"):
        submit.submit(
            load_config(config, [f"train.out={tmp_path}/other"]),
            submit.parse("timeout_min=5,tasks_per_node=3"),
            resume=False,
        )
