"""kill -9 at any moment: the run that is resumed is the uninterrupted one, to the bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from tests.e2e.harness import Runner, equal, kill_after, kill_in_checkpoint, losses, no_leftovers, weights
from tests.e2e.random_kills import run_kills


def test_kill_nine_at_random_moments(runner: Runner, config: Path, tmp_path: Path) -> None:
    rng = random.Random(20)
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "run"
    # Drop path draws random numbers in the model; a mask from the reference's generators has a state.
    arguments = ("--config", config, "--max-steps", 40, "model.drop_path_rate=0.2", "mask.source=reference")
    runner.run(*arguments, "--out", uninterrupted)
    steps = sorted(rng.sample(range(1, 36), 4))
    moments = [(kill_after, (step, rng.uniform(0, 0.04))) for step in steps]
    # The middle of a checkpoint is too short a moment to be hit by chance.
    moments.insert(rng.randrange(5), (kill_in_checkpoint, (2,)))
    for moment in moments:
        run = runner.start(*arguments, "--out", out, "--resume", patches=[moment])
        assert run.wait() == -signal.SIGKILL, run.stderr
    runner.run(*arguments, "--out", out, "--resume")
    assert losses(out) == losses(uninterrupted)
    assert len(losses(out)) == 40
    assert equal(weights(out), weights(uninterrupted))
    assert no_leftovers(tmp_path)


def test_resume_starts_at_the_last_checkpoint(runner: Runner, config: Path, tmp_path: Path) -> None:
    arguments = ("--config", config, "--out", tmp_path / "run", "--max-steps", 9)
    run = runner.start(*arguments, patches=[(kill_after, (7, 0.0))])
    assert run.wait() == -signal.SIGKILL
    assert "at step 6" in runner.run(*arguments, "--resume").stdout


def test_random_kills(runner: Runner, config: Path, tmp_path: Path) -> None:
    """A few of what random_kills.py does a hundred times."""
    run_kills(
        runner, config, tmp_path / "two", num_kills=3, num_processes=2, seed=4, changes=("train.async_checkpoint=true",)
    )
