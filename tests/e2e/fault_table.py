"""Disks that are full or read-only, checkpoints cut short or with a changed bit: what a user sees, and what is left.

    python -m tests.e2e.fault_table [--format sharded]

Prints a Markdown table. Raises AssertionError where something is lost, silent, or ends in a traceback.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.e2e.conftest import CONFIG, write_video
from tests.e2e.harness import (
    Run,
    Runner,
    equal,
    full_disk_in_checkpoint,
    full_disk_in_shards,
    losses,
    no_leftovers,
    read_only_at_checkpoint,
    weights,
)
from vjepa_fast.checkpoints.run_folder import newest_checkpoint
from vjepa_fast.checkpoints.writer import damage
from vjepa_fast.common import markdown

STEPS = 9
"""Of a run; a checkpoint every 3."""


class Table:
    """Rows, and the run that nothing happened to.

    Args:
        folder: for everything.
        kind: train.checkpoint_format.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.settings = (f"train.checkpoint_format={kind}",)
        for number in range(8):
            write_video(folder / f"{number}.mp4", number)
        (folder / "list.csv").write_text("".join(f"{folder}/{number % 8}.mp4 0\n" for number in range(24)))
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG.format(csv=folder / "list.csv", cache=folder / "cache"))
        self.runner = Runner(folder / "streams")
        self.alone = folder / "alone"
        self.train(self.alone)

    def train(self, out: Path, code: int = 0, patches: list[tuple] | None = None) -> Run:  # type: ignore[type-arg]
        """A run, or the rest of one."""
        return self.runner.run(
            "--config",
            self.config,
            "--out",
            out,
            "--resume",
            "--max-steps",
            STEPS,
            *self.settings,
            code=code,
            patches=patches,
        )

    def row(self, what: str, said: str, run: Run, out: Path) -> None:
        """A line; the run has to have ended as the one that was left alone."""
        assert losses(out) == losses(self.alone) and equal(weights(out), weights(self.alone)), what
        assert no_leftovers(out)
        went_on = next(line.rsplit(" ", 1)[1] for line in run.stdout.splitlines() if line.startswith("continuing "))
        print(markdown.row([what, said.replace(str(out), "RUN"), f"step {went_on}, the same to the bit"]), flush=True)

    def disk(self, what: str, patch: tuple) -> None:  # type: ignore[type-arg]
        """A disk that refuses the third checkpoint."""
        out = self.folder / what.replace(" ", "-")
        failed = self.train(out, code=1, patches=[patch])
        assert failed.stderr.startswith("error: cannot write checkpoint") and failed.stderr.count("\n") == 1
        newest = newest_checkpoint(out)
        assert newest is not None and damage(newest) is None
        self.row(what, failed.stderr.removeprefix("error: ").strip(), self.train(out), out)

    def damaged(self, what: str, change, rng: random.Random) -> None:  # type: ignore[no-untyped-def]
        """The checkpoint of step 6, or a file of it, changed after a run of 6 steps; the one before it is of step 3."""
        out = self.folder / what.replace(" ", "-").replace(",", "")
        self.runner.run("--config", self.config, "--out", out, "--max-steps", 6, *self.settings)
        latest = newest_checkpoint(out)
        assert latest is not None
        # Of a folder, any byte of any file.
        files = sorted(latest.iterdir()) if latest.is_dir() else [latest]
        [file] = rng.choices(files, [path.stat().st_size for path in files])
        file.write_bytes(change(file.read_bytes()))
        harmless = damage(latest) is None
        run = self.train(out)
        said = [line for line in run.stdout.splitlines() if "is left aside" in line]
        assert bool(said) != harmless
        self.row(what, said[0] if said else "nothing: no part of the contents is changed", run, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="How many cuts, and how many flipped bits.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", choices=["meta", "sharded"], default="meta", help="train.checkpoint_format")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    def cut(data: bytes) -> bytes:
        return data[: rng.randrange(len(data))]

    def flip(data: bytes) -> bytes:
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]

    with tempfile.TemporaryDirectory() as name:
        table = Table(Path(name), arguments.format)
        sharded = arguments.format == "sharded"
        what = "step6.dcp" if sharded else "latest.pt"
        print("\n".join(markdown.table(["what happens", "what is said", "where the run goes on"], [])))
        full = full_disk_in_shards if sharded else full_disk_in_checkpoint
        table.disk("disk full during a checkpoint", (full, (3,)))
        table.disk("folder becomes read-only", (read_only_at_checkpoint, (3,)))
        for number in range(arguments.times):
            table.damaged(f"{what} cut short, {number + 1}", cut, rng)
        for number in range(arguments.times):
            table.damaged(f"a bit of {what} flipped, {number + 1}", flip, rng)


if __name__ == "__main__":
    sys.exit(main())
