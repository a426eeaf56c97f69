"""A full disk, a terminal, a reader that goes away."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Runner, full_disk_in_checkpoint, losses, no_leftovers, wait_until


def test_full_disk_at_a_checkpoint(runner: Runner, config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = runner.run("--config", config, "--out", out, code=1, patches=[(full_disk_in_checkpoint, (3,))])
    assert run.stderr == (
        f"error: cannot write checkpoint {out}/latest.pt: the disk is full; free some space and "
        "continue with --resume. The checkpoint written before it is intact\n"
    )
    assert no_leftovers(out)
    assert "at step 6\n" in runner.run("--config", config, "--out", out, "--max-steps", 12, "--resume").stdout
    assert losses(out) == losses(uninterrupted)[:12]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which one checkpoint fits and a second beside it does not."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_really_full_disk(runner: Runner, config: Path, small_disk: Path) -> None:
    arguments = ("--config", config, "--out", small_disk / "run")
    run = runner.run(*arguments, code=1)
    assert "latest.pt: the disk is full" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert no_leftovers(small_disk)
    # Not even a line of the log fits.
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
    run = runner.run(*arguments, "--resume", code=1)
    assert "the disk is full" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    (small_disk / "filler").unlink()
    assert "at step 3\n" in runner.run(*arguments, "--resume", "--max-steps", 3).stdout
    assert len(losses(small_disk / "run")) == 3


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "vjepa_fast", "train", *map(str, argv)]


def test_terminal(config: Path, tmp_path: Path) -> None:
    """A bar with its figures; after Ctrl-C the cursor is back and the prompt starts on a line of its own."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command("--config", config, "--out", tmp_path / "run"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def read() -> bytes:
        nonlocal seen
        # Nothing there now, or the other side is closed.
        with contextlib.suppress(OSError):
            seen += os.read(ours, 65536)
        return seen

    wait_until(lambda: b"eta 0:0" in read(), "the figures in the bar")
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: (read(), process.poll())[1] is not None, "the end")
    text = read().decode()
    assert process.returncode == 130
    assert "Traceback" not in text
    for word in ("step ", "/600", "loss ", "lr ", "clips/s", "data wait ", "%"):
        assert word in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.split("\r\n")[-3:] == [
        "continue with --resume",
        f"report {tmp_path}/run/report.html, curve {tmp_path}/run/loss.png",
        "",
    ]


def test_reader_that_goes_away(config: Path, tmp_path: Path) -> None:
    """`vjepa-fast train | head -2`."""
    process = subprocess.Popen(
        command("--config", config, "--out", tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdout is not None and process.stderr is not None
    for _ in range(4):
        process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert error.startswith("error: the output was closed (a broken pipe): stopped at step ")
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "latest.pt").exists()


def test_log_without_a_terminal(runner: Runner, uninterrupted: Path, config: Path, tmp_path: Path) -> None:
    """One line after the first step, every log_every steps and at every checkpoint, nothing on stderr."""
    run = runner.run(
        "--config",
        config,
        "--out",
        tmp_path / "run",
        "--max-steps",
        8,
        "train.log_every=4",
        "train.checkpoint_every=100",
    )
    lines = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("step ")]
    assert lines == ["1/8", "4/8", "8/8"]
    assert run.stderr == ""
