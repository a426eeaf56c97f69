"""Ctrl-C and SIGTERM: a checkpoint, the right exit code, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import LATE
from tests.e2e.harness import Runner, equal, losses, no_leftovers, signal_in_setup, signal_in_step, wait_until, weights

STEPS = 12


def check_resumed(runner: Runner, config: Path, out: Path, uninterrupted: Path, at_step: int) -> None:
    run = runner.run("--config", config, "--out", out, "--max-steps", STEPS, "--resume")
    assert f"at step {at_step}\n" in run.stdout
    assert losses(out) == losses(uninterrupted)[:STEPS]
    assert no_leftovers(out)


def test_during_a_step(runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = runner.run("--config", config, "--out", out, code=130, patches=[(signal_in_step, (7, signal.SIGINT))])
    assert f"at step 8 of 600: loss {float(losses(out)[7]):.4f}" in run.stdout
    assert "continue with --resume" in run.stdout
    assert "Ctrl-C again" in run.stderr
    check_resumed(runner, config, out, uninterrupted, 8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_while_waiting_for_data(
    num_workers: int, runner: Runner, config: Path, stuck: Callable[[], None], uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = runner.start("--config", config, "--out", out, f"data.num_workers={num_workers}")
    wait_until(lambda: f"step {LATE}/" in run.stdout, "the steps before the missing video")
    run.signal(signal.SIGINT, group=True)
    assert run.wait() == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert not (out / "broken_r0.tsv").exists()
    stuck()
    check_resumed(runner, config, out, uninterrupted, LATE)


def test_before_the_first_step(runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = runner.run("--config", config, "--out", out, code=143, patches=[(signal_in_setup, (signal.SIGTERM,))])
    assert "ended by SIGTERM at step 0" in run.stdout
    check_resumed(runner, config, out, uninterrupted, 0)


def test_at_the_last_step_the_run_is_complete(
    runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    arguments = ("--config", config, "--out", tmp_path / "run", "--max-steps", 40)
    runner.run(*arguments, code=143, patches=[(signal_in_step, (39, signal.SIGTERM))])
    assert equal(weights(tmp_path / "run"), weights(uninterrupted))
    run = runner.run(*arguments, "--resume")
    assert f"loss {float(losses(uninterrupted)[-1]):.4f}" in run.stdout
    assert losses(tmp_path / "run") == losses(uninterrupted)


def test_second_ctrl_c_leaves_at_once(runner: Runner, config: Path, tmp_path: Path) -> None:
    run = runner.run(
        "--config", config, "--out", tmp_path / "run", code=130, patches=[(signal_in_step, (7, signal.SIGINT, 2))]
    )
    assert run.stderr.endswith("error: interrupted\n")
    assert "interrupted at step" not in run.stdout
    assert no_leftovers(tmp_path)
    # Nothing after the checkpoint at step 6.
    assert (
        "at step 6\n" in runner.run("--config", config, "--out", tmp_path / "run", "--max-steps", 7, "--resume").stdout
    )
