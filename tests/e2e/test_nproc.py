"""`--nproc 2` ends as a run of one process does, however it is stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import LATE
from tests.e2e.harness import Runner, losses, no_leftovers, wait_until


def close(a: list[str], b: list[str]) -> bool:
    return len(a) == len(b) and all(abs(float(x) - float(y)) <= 1e-6 for x, y in zip(a, b, strict=True))


def test_signalled_as_from_a_terminal(
    runner: Runner, config: Path, stuck: Callable[[], None], uninterrupted: Path, tmp_path: Path
) -> None:
    """Ctrl-C reaches parent, ranks and decoders at once while one rank waits for data; one process goes on."""
    out = tmp_path / "run"
    run = runner.start("--config", config, "--out", out, "--nproc", 2)
    wait_until(lambda: f"step {LATE}/" in run.stdout, "the steps before the missing video")
    run.signal(signal.SIGINT, group=True)
    assert run.wait() == 130, run.stderr
    assert "Traceback" not in run.stderr
    stuck()
    one = runner.run("--config", config, "--out", out, "--max-steps", 12, "--resume")
    assert f"at step {LATE}\n" in one.stdout
    assert "changed" not in one.stdout
    assert close(losses(out), losses(uninterrupted)[:12])


def test_parent_signalled(
    runner: Runner, config: Path, stuck: Callable[[], None], uninterrupted: Path, tmp_path: Path
) -> None:
    """A checkpoint of one process goes on as two, which are preempted while one of them waits for data."""
    out = tmp_path / "run"
    runner.run("--config", config, "--out", out, "--max-steps", 2)
    run = runner.start("--config", config, "--out", out, "--resume", "--nproc", 2)
    wait_until(lambda: f"step {LATE}/" in run.stdout, "the steps before the missing video")
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.stderr
    assert run.stderr == ""
    assert close(losses(out), losses(uninterrupted)[:LATE])


def test_second_ctrl_c_leaves_at_once(runner: Runner, config: Path, stuck: Callable[[], None], tmp_path: Path) -> None:
    run = runner.start("--config", config, "--out", tmp_path / "run", "--nproc", 2)
    wait_until(lambda: len(run.ranks()) == 2, "both processes")
    run.signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again" in run.stderr, "the first to be noticed")
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert run.stderr.endswith("error: interrupted\n")
    assert "Traceback" not in run.stderr
    assert no_leftovers(tmp_path)


def test_a_process_that_dies_ends_the_others(
    runner: Runner, config: Path, stuck: Callable[[], None], tmp_path: Path
) -> None:
    run = runner.start("--config", config, "--out", tmp_path / "run", "--nproc", 2)
    wait_until(lambda: f"step {LATE}/" in run.stdout, "the steps before the missing video")
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait() == 1
    assert run.stderr.startswith("error: training process 1 of 2 was ended by SIGKILL")
    assert "Traceback" not in run.stderr


def test_error_of_any_process_is_shown_once(runner: Runner, config: Path, tmp_path: Path) -> None:
    """Every video of the second process is missing."""
    lines = (tmp_path / "list.csv").read_text().splitlines()
    lines = [line if index % 4 < 2 else f"gone{index}.mp4 0" for index, line in enumerate(lines)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    run = runner.run("--config", config, "--out", tmp_path / "run", "--nproc", 2, "--max-steps", 30, code=1)
    assert run.stderr.count("error:") == 1
    assert "more than data.max_broken=0.1" in run.stderr


def test_batch_that_cannot_be_divided(runner: Runner, config: Path, tmp_path: Path) -> None:
    run = runner.run("--config", config, "--out", tmp_path / "run", "--nproc", 3, code=2)
    assert "data.global_batch_size=4 is not a multiple of 3 processes" in run.stderr
    assert not (tmp_path / "run").exists()
