"""Kills runs at random moments, resumes them, and compares with a run that nobody killed.

    python -m tests.e2e.random_kills --kills 100 [--format sharded]

Half of the runs are one process, half two (the two tasks of srun; with sharded checkpoints the parameters are sharded
too). A kill is SIGKILL of one process or of all, at a random time or in the middle of a checkpoint. After each, the run
resumes until the next kill; it has to go on from a step at most one interval before the last step that was logged (two
with --background, where the checkpoint may still have been on its way). At the end losses, weights and optimizer state
are those of the run that was left alone, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.conftest import CONFIG, write_video
from tests.e2e.harness import (
    TIMEOUT,
    Run,
    Runner,
    equal,
    kill_after,
    kill_in_checkpoint,
    kill_in_shards,
    losses,
    no_leftovers,
    start_tasks,
    weights,
)
from vjepa_fast.train.monitor.metrics import read_csv

INTERVAL = 3
"""Steps between checkpoints, as in CONFIG."""
BACKGROUND = "train.async_checkpoint=true"


class Campaign:
    """One run that is killed again and again.

    Args:
        runner: starts the processes.
        config: file.
        out: run folder.
        num_processes: 1 or 2.
        changes: overrides.
        sharded: checkpoints are, which both processes write.
    """

    def __init__(
        self, runner: Runner, config: Path, out: Path, num_processes: int, changes: list[str], sharded: bool = False
    ) -> None:
        self.runner, self.out, self.num_processes, self.sharded = runner, out, num_processes, sharded
        self.limit = INTERVAL * (2 if BACKGROUND in changes else 1)
        self.arguments = ["--config", config, "--out", out, "--resume", *changes]

    def start(self, last_step: int, patches: list[Any] | None = None) -> list[Run]:
        """Processes that would train up to `last_step`; the patches are run in the last of them."""
        arguments = [*self.arguments, "--max-steps", last_step]
        if self.num_processes == 1:
            return [self.runner.start(*arguments, patches=patches)]
        return start_tasks(self.runner, *arguments, patches=patches)

    def kill(self, rng: random.Random, last_step: int) -> str:
        """One kill. Returns what it was.

        Raises:
            AssertionError: more than one interval was lost, or a process ended in another way.
        """
        before = self.logged()
        done = before[-1] if before else 0
        kind = rng.choice(["one", "all", "checkpoint"])
        if kind == "checkpoint" and self.sharded:
            # Of about 150 tensors, and in the first process run.pt behind them.
            patch: Any = (kill_in_shards, (rng.randint(1, 2), rng.randint(1, 160 // self.num_processes)))
        elif kind == "checkpoint":
            patch = (kill_in_checkpoint, (rng.randint(1, 2),))
        else:
            patch = (kill_after, (min(last_step - 1, done + rng.randrange(1, 2 * INTERVAL)), rng.uniform(0, 0.05)))
        # Of a single file the first process is the writer.
        in_first = kind == "checkpoint" and (not self.sharded or rng.random() < 0.5)
        if in_first and self.num_processes == 2:
            runs = start_tasks(self.runner, *self.arguments, "--max-steps", last_step, first_patches=[patch])
        else:
            runs = self.start(last_step, [patch])
        killed = runs[0] if in_first else runs[-1]
        killed.process.join(TIMEOUT)
        for run in runs:
            if run is not killed and kind == "all":
                # It may have noticed and ended by itself.
                with contextlib.suppress(ProcessLookupError):
                    run.signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, f"{kind}: {killed.stderr}"
        for run in runs:
            if run is not killed:
                assert run.wait() != 0
            assert "Traceback" not in run.stderr, run.stderr
        self.check(runs[0].stdout, done)
        return kind

    def check(self, stdout: str, done: int) -> None:
        """Resuming went on from a step at most an interval, or two, before what was logged."""
        resumed = 0
        for line in stdout.splitlines():
            if line.startswith("continuing "):
                resumed = int(line.rsplit(" ", 1)[1])
        assert resumed >= done - self.limit, (
            f"lost more than {self.limit} steps: step {done} was logged, {resumed} went on"
        )

    def logged(self) -> list[int]:
        """Steps done, by the log."""
        return [int(row["step"]) + 1 for row in read_csv(self.out / "log_r0.csv")]


def run_kills(
    runner: Runner,
    config: Path,
    folder: Path,
    num_kills: int,
    num_processes: int,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
    changes: tuple[str, ...] = (),
    sharded: bool = False,
) -> None:
    """Kills, and the comparison at the end.

    Raises:
        AssertionError: a resumed run is not the one that was left alone.
    """
    rng = random.Random(seed)
    settings = ["model.drop_path_rate=0.2", "train.log_every=1", *changes]
    if sharded:
        settings += ["train.checkpoint_format=sharded", "train.parallel=fsdp"]
    last_step = INTERVAL * (num_kills + 3)
    campaign = Campaign(runner, config, folder / f"killed-{num_processes}", num_processes, settings, sharded)
    for number in range(num_kills):
        # Never at the end, where a run has nothing left to be killed in.
        done = (campaign.logged() or [0])[-1]
        if done > last_step - 3 * INTERVAL:
            last_step += 10 * INTERVAL
        kind = campaign.kill(rng, last_step)
        say(
            f"{num_processes} processes, kill {number + 1} of {num_kills} ({kind}) at step "
            f"{(campaign.logged() or [0])[-1]}"
        )
    alone = Campaign(runner, config, folder / f"alone-{num_processes}", num_processes, settings)
    for some in (campaign, alone):
        codes = [run.wait() for run in some.start(last_step)]
        assert codes == [0] * num_processes, codes
    assert losses(campaign.out) == losses(alone.out)
    assert len(losses(alone.out)) == last_step
    assert equal(weights(campaign.out), weights(alone.out))
    assert no_leftovers(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--background", action="store_true", help=BACKGROUND)
    parser.add_argument("--format", choices=["meta", "sharded"], default="meta", help="train.checkpoint_format")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(8):
            write_video(folder / f"{number}.mp4", number)
        (folder / "list.csv").write_text("".join(f"{folder}/{number % 8}.mp4 0\n" for number in range(24)))
        config = folder / "tiny.yaml"
        config.write_text(CONFIG.format(csv=folder / "list.csv", cache=folder / "cache"))
        runner = Runner(folder / "streams")
        half = arguments.kills // 2
        changes = (BACKGROUND,) if arguments.background else ()
        for count, kills in ((1, arguments.kills - half), (2, half)):
            run_kills(
                runner,
                config,
                folder,
                kills,
                count,
                arguments.seed + count - 1,
                print,
                changes,
                arguments.format == "sharded",
            )
    lost = INTERVAL * (2 if changes else 1)
    print(
        f"{arguments.kills} kills, every resume went on, at most {lost} steps lost, the same losses and weights to "
        f"the bit; {time.monotonic() - begun:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
