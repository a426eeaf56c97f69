"""`vjepa-fast pack`: what it prints is true, mistakes get a sentence, and Ctrl-C leaves what can be gone on with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vjepa_fast.cli.main import app


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(
        app, ["pack", *map(str, args)], prog_name="vjepa-fast", env={"COLUMNS": "200", "NO_COLOR": "1"}
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images, one of them broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "03.png").write_bytes(b"no image")
    return folder


def test_summary_is_true(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    result = invoke(images, "--out", out, "--short-side", "32", "--shard-size", "20KB", "--workers", "1")
    assert result.exit_code == 0, result.output
    sizes = {file.name: file.stat().st_size for file in out.iterdir()}
    source = sum(file.stat().st_size for file in images.iterdir()) - 8
    packed = sum(size for name, size in sizes.items() if name != "broken.tsv")
    num_shards = sum(name.startswith("shard") for name in sizes)
    assert num_shards > 1
    lines = result.stdout.splitlines()
    assert lines[0] == (
        f"{out}: 11 videos, 11 frames, {num_shards} shards, {packed / 1e3:.3g} KB, "
        f"{packed / source:.2f} of the {source / 1e3:.3g} KB of the videos"
    )
    assert re.fullmatch(r"PSNR \d\d\.\d dB over 11 frames; \d+ core-milliseconds a video; 0:00:0\d", lines[1])
    assert lines[2] == f"train on it with data.datasets={out}"
    assert f"1 of 12 videos could not be packed: {out}/broken.tsv" in result.stderr
    assert "packed 12/12" in result.stderr
    again = invoke(images, "--out", out, "--short-side", "32", "--shard-size", "20KB", "--workers", "2")
    assert again.exit_code == 0 and "it was finished before; nothing was done" in again.stdout


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["nowhere.csv", "--out", "o"], "dataset 'nowhere.csv' does not exist; expected a CSV", 1),
        (["images", "--out", "o", "--fps", "0"], "--fps is 0; expected a positive number of frames per second", 2),
        (["images", "--out", "o", "--short-side", "250"], "--short-side is 250; expected a multiple of 32", 2),
        (["images", "--out", "o", "--shard-size", "2 jars"], "--shard-size is '2 jars'; expected a number with B", 2),
        (["images", "--out", "o", "--shard-size", "0"], "--shard-size is '0'; expected", 2),
        (["images", "--out", "images"], "--out images is no pack and not empty; expected a new folder", 1),
        (["s3://bucket/pack", "--out", "o"], "s3://bucket/pack is a pack already; expected videos", 1),
        (["images", "--out", "o", "--max-broken", "0"], "more than --max-broken 0 of the videos cannot be packed", 1),
        (["images", "--out", "images/00.png/o"], "cannot write images/00.png/o/.unfinished: Not a directory", 1),
    ],
)
def test_mistakes(images: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str, code: int) -> None:
    monkeypatch.chdir(images.parent)
    result = invoke(*args)
    assert result.exit_code == code and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["images"], "Missing option '--out'"),
        (["images", "--out", "o", "--qality", "90"], "--quality"),
        (["images", "--out", "o", "--quality", "96"], "Invalid value for '--quality'"),
    ],
)
def test_usage(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and message in result.stderr


def test_sizes() -> None:
    from vjepa_fast.cli.pack import _num_bytes, _size

    assert [_num_bytes(text) for text in ("500MB", "1.5 gb", "2G", "123", "7B", "1k")] == [
        500 * 10**6,
        1500 * 10**6,
        2 * 10**9,
        123,
        7,
        1000,
    ]
    assert [_size(number) for number in (12, 1200, 3 * 10**9)] == ["12 bytes", "1.2 KB", "3 GB"]


def test_help_says_what_it_is() -> None:
    result = invoke("--help")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "--two-phase" in text and "train --recipe vitl16-256 data.datasets=" in text
    assert "run the same command to continue" in text


def test_interrupted_and_gone_on_with(images: Path, tmp_path: Path) -> None:
    # Many times the same image, so that it is at work when the signal comes.
    (tmp_path / "list.csv").write_text("".join(f"{images}/00.png {k}\n" for k in range(4000)))
    command = [
        sys.executable,
        "-m",
        "vjepa_fast",
        "pack",
        "list.csv",
        "--out",
        "out",
        "--short-side",
        "32",
        "--workers",
        "2",
    ]
    # A shell starts what runs in the background with the signal ignored, and children inherit that.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    parts = tmp_path / "out" / ".unfinished" / "parts"
    until = time.monotonic() + 60
    # More than have to be counted below: what a worker has written is counted a moment later.
    while len(list(parts.glob("*.json"))) < 20 and time.monotonic() < until:
        time.sleep(0.05)
    # As a terminal does it: to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    found = re.search(r"warning: (\d+) of 4000 videos are done and kept; run the same command to continue", errors)
    assert found and "error: interrupted" in errors and "Traceback" not in errors
    assert len(list(parts.glob("*.json"))) >= int(found[1]) >= 5
    # Nobody is left.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
