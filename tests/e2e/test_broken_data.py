"""Broken files and dying decoding processes in the middle of a run."""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.conftest import LATE
from tests.e2e.harness import Runner, equal, losses, no_leftovers, weights

GIVEN_UP = "started in its place, 3 times"


def die_in(name: str) -> None:
    """Patch: the decoding process that opens a file of this name is killed, as for want of memory."""
    from vjepa_fast.data import frame_sources, worker_supervisor

    worker_supervisor._POLL_SECONDS = 0.2
    original, parent = frame_sources.open_source, os.getpid()

    def open_source(path: str, *rest: Any) -> Any:
        if path.endswith(name) and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *rest)

    frame_sources.open_source = open_source  # type: ignore[assignment]


def die_once_a_step(*steps: int) -> None:
    """Patch: the first decoding process is killed while these steps are computed."""
    from vjepa_fast.train.trainer import Trainer

    original = Trainer.run_step

    def run_step(self: Trainer, batch: Any) -> Any:
        if self.step in steps:
            os.kill(self.loader.worker_pids()[0], signal.SIGKILL)
        return original(self, batch)

    Trainer.run_step = run_step  # type: ignore[method-assign]


def test_a_tenth_of_the_files_is_broken(runner: Runner, config: Path, videos: Path, tmp_path: Path) -> None:
    """With the default of data.max_broken, in two epochs of random order."""
    whole = (videos / "0.mp4").read_bytes()
    flipped = np.frombuffer(whole, np.uint8).copy()
    # Where pictures are coded; the container is left whole.
    begin = whole.index(b"mdat") + 400
    flipped[begin : begin + 4000 : 7] ^= 0x55
    bad = {
        "cut.mp4": whole[: len(whole) // 2],
        "flipped.mp4": flipped.tobytes(),
        "empty.mp4": b"",
        "text.mp4": b"no video at all\n" * 50,
        "gone.mp4": None,
    }
    lines = [f"{videos / f'{number % 8}.mp4'} 0\n" for number in range(45)]
    for number, (name, content) in enumerate(bad.items()):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        lines.insert(9 * number, f"{tmp_path / name} 0\n")
    (tmp_path / "tenth.csv").write_text("".join(lines))
    out = tmp_path / "run"
    # A clip as long as the video, so that no damage lies outside of it.
    run = runner.run(
        "--config",
        config,
        "--out",
        out,
        "--max-steps",
        26,
        f"data.datasets=[{tmp_path / 'tenth.csv'}]",
        "data.shuffle=true",
        "data.fps=null",
        "data.frame_step=5",
    )
    with (out / "broken_r0.tsv").open() as file:
        listed = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file, delimiter="\t")}
    assert listed.keys() == bad.keys() and all(listed.values())
    assert listed["gone.mp4"] == "the file does not exist" and listed["empty.mp4"] == "the file is empty"
    assert "5 of 50 videos could not be read and were replaced" in run.stdout
    assert len(losses(out)) == 26 and all(math.isfinite(float(loss)) for loss in losses(out))


def test_killed_decoding_processes_cost_nothing(
    runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = runner.run(
        "--config", config, "--out", out, "--max-steps", 40, "data.num_workers=2", patches=[(die_once_a_step, (3, 20))]
    )
    assert run.stderr.count("a decoding process died") == 2 and "no clip is lost" in run.stderr
    assert losses(out) == losses(uninterrupted) and equal(weights(out), weights(uninterrupted))


def test_processes_that_die_again_and_again_lose_no_step(
    runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("--config", config, "--out", out, "--max-steps", 12, "train.checkpoint_every=100")
    run = runner.run(*arguments, code=1, patches=[(die_in, ("late.png",))])
    assert GIVEN_UP in run.stderr and "late.png" in run.stderr
    # Batches that a process had finished when it died may be lost with it: they come again.
    (stopped,) = map(int, re.findall(r"stopped at step (\d+)", run.stdout))
    assert 0 < stopped <= LATE and "continue with --resume" in run.stdout
    assert losses(out) == losses(uninterrupted)[:stopped]
    assert f"at step {stopped}\n" in runner.run(*arguments, "--resume").stdout
    assert losses(out) == losses(uninterrupted)[:12] and no_leftovers(tmp_path)


def test_no_clips_for_one_of_two_processes(
    runner: Runner, config: Path, videos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """A dataset of one file that is not there: nothing can replace it. Both processes stop at the same step."""
    lines = (config.parent / "list.csv").read_text().splitlines(keepends=True)
    names = []
    for number, part in enumerate((lines[: 4 * LATE], lines[4 * LATE : 4 * LATE + 1], lines[4 * LATE + 1 :])):
        names.append(str(tmp_path / f"{number}.csv"))
        Path(names[-1]).write_text("".join(part))
    late = config.parent / "late.png"
    late.unlink()
    out = tmp_path / "run"
    arguments = (
        "--config",
        config,
        "--out",
        out,
        "--max-steps",
        12,
        "train.checkpoint_every=100",
        f"data.datasets=[{','.join(names)}]",
    )
    run = runner.run(*arguments, "--nproc", 2, code=1)
    assert "no usable video found in dataset" in run.stderr and str(late) in run.stderr
    shutil.copy(videos / "late.png", late)
    assert f"at step {LATE}\n" in runner.run(*arguments, "--resume").stdout
    ours, theirs = losses(out), losses(uninterrupted)[:12]
    assert len(ours) == 12 and all(abs(float(a) - float(b)) <= 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_run_without_any_clip_leaves_no_checkpoint(runner: Runner, config: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.csv").write_text("gone.mp4 0\n")
    run = runner.run("--config", config, "--out", tmp_path / "run", f"data.datasets=[{tmp_path / 'gone.csv'}]", code=1)
    assert "no usable video found" in run.stderr
    assert not (tmp_path / "run" / "latest.pt").exists() and "checkpoint" not in run.stdout
