"""Manifests of numbers out of labelled clips of physics: the right frames, and which videos are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import write_video
from vjepa_fast.evaluation import physics_targets
from vjepa_fast.evaluation.labels import read_labels

NUM_FRAMES = 20
"""At 12 a second: a clip of 4 frames at 6 a second is frames 6, 8, 11, 13."""


def entry(number: int, **changes: Any) -> dict[str, Any]:
    """Two discs; the main one moves to the right by a hundredth a frame."""
    return {
        "violation": None, "radius": [0.1, 0.1], "present": [[True, True]] * NUM_FRAMES,
        "position": [[[0.01 * frame + 0.1 * number, 0.5 + 0.1 * number], [9.0, 9.0]] for frame in range(NUM_FRAMES)],
        "velocity": [[[0.12 + 0.1 * number, 0.0 + number], [9.0, 9.0]] for _ in range(NUM_FRAMES)],
        "contact_in": [[2.0 - 0.1 * frame, 9.0] for frame in range(NUM_FRAMES)],
        "visible": [[1.0 if frame < 10 else 0.2, 1.0] for frame in range(NUM_FRAMES)], **changes}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    entries = {
        "train/0.mp4": entry(0), "train/1.mp4": entry(1), "train/2.mp4": entry(2, violation={"kind": "jump"}),
        "train/3.mp4": entry(3, contact_in=[[None, None]] * NUM_FRAMES, visible=[[1.0, 1.0]] * NUM_FRAMES)}
    for name in entries:
        write_video(tmp_path / name, num_frames=NUM_FRAMES, fps=12, preset="ultrafast")
    (tmp_path / "train_labels.json").write_text(json.dumps(entries))
    path = tmp_path / "train.csv"
    path.write_text("".join(f"{name} 1\n" for name in entries))
    return path


def test_numbers_of_the_clip(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    physics_targets.main([str(manifest), "--frames", "4", "--fps", "6"])
    assert f"{manifest.parent / 'train_position.csv'}: 3 videos" in capsys.readouterr().out
    found = {}
    for name in physics_targets.TARGETS:
        own = str(manifest.parent / f"train_{name}.csv")
        labels = read_labels(own, own, "regression") if name not in ("contact", "hidden") else None
        lines = [line.rsplit(" ", 1) for line in Path(own).read_text().splitlines()]
        found[name] = {Path(path).stem: [float(x) for x in text.split(",")] for path, text in lines}
        assert labels is None or len(labels.targets) == len(found[name]["0"])
    assert found["position"] == {"0": [0.11, 0.5], "1": [0.21, 0.6], "3": [0.41, 0.8]}
    assert found["track"]["0"] == [0.06, 0.5, 0.08, 0.5, 0.11, 0.5, 0.13, 0.5]
    assert found["velocity"]["1"] == pytest.approx([0.22, 1.0])
    # 0.7 seconds from frame 13; none of video 3.
    assert found["contact"] == {"0": [pytest.approx(0.7)], "1": [pytest.approx(0.7)]}
    assert found["hidden"] == {"0": [0.13, 0.5], "1": [0.23, 0.6]}


def test_without_labels(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (manifest.parent / "train_labels.json").unlink()
    with pytest.raises(SystemExit, match=r"error: no labels at .*train_labels.json"):
        physics_targets.main([str(manifest)])
