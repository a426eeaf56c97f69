"""Manifests out of labelled clips of physics: the right frames, the right class, and which videos are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import write_video
from vjepa_fast.data.generated.physics_scenes import render, simulate
from vjepa_fast.evaluation import physics_targets
from vjepa_fast.evaluation.labels import read_labels
from vjepa_fast.evaluation.physics_targets import BEHIND, FRONT, behind, front

NUM_FRAMES = 20
"""At 12 a second: a clip of 4 frames at 6 a second is frames 6, 8, 11, 13."""


def entry(number: int, **changes: Any) -> dict[str, Any]:
    """Two discs; the main one moves to the right by a hundredth a frame."""
    return {
        "violation": None,
        "radius": [0.1, 0.1],
        "present": [[True, True]] * NUM_FRAMES,
        "position": [[[0.01 * frame + 0.1 * number, 0.5 + 0.1 * number], [9.0, 9.0]] for frame in range(NUM_FRAMES)],
        "velocity": [[[0.12 + 0.1 * number, 0.0 + number], [9.0, 9.0]] for _ in range(NUM_FRAMES)],
        "contact_in": [[2.0 - 0.1 * frame, 9.0] for frame in range(NUM_FRAMES)],
        "visible": [[1.0 if frame < 10 else 0.2, 1.0] for frame in range(NUM_FRAMES)],
        "hidden_by": [[None, None] if frame < 10 else ["screen", None] for frame in range(NUM_FRAMES)],
        "front": [1, 0],
        "boxes": {},
        **changes,
    }


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    entries = {
        "train/0.mp4": entry(0),
        "train/1.mp4": entry(1),
        "train/2.mp4": entry(2, violation={"kind": "jump"}),
        "train/3.mp4": entry(
            3,
            contact_in=[[None, None]] * NUM_FRAMES,
            visible=[[1.0, 1.0]] * NUM_FRAMES,
            hidden_by=[[None, None]] * 12 + [[None, 0]] * 8,
        ),
        "train/4.mp4": entry(
            4, position=[[[0.5, 0.5], [0.5, 0.6] if frame == 8 else [0.9, 0.9]] for frame in range(NUM_FRAMES)]
        ),
        "train/5.mp4": entry(5, position=[[[0.5, 0.5], [0.5, 0.6]]] * NUM_FRAMES, front=[0, 1]),
    }
    for name in entries:
        write_video(tmp_path / name, num_frames=NUM_FRAMES, fps=12, preset="ultrafast")
    (tmp_path / "train_labels.json").write_text(json.dumps(entries))
    path = tmp_path / "train.csv"
    path.write_text("".join(f"{name} 1\n" for name in entries))
    return path


def test_numbers_of_the_clip(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    physics_targets.main([str(manifest), "--frames", "4", "--fps", "6"])
    said = capsys.readouterr().out
    assert f"{manifest.parent / 'train_position.csv'}: 5 videos\n" in said
    assert f"{manifest.parent / 'train_behind.csv'}: 5 videos (1 other behind main, 4 main behind screen)\n" in said
    assert f"{manifest.parent / 'train_front.csv'}: 2 videos (1 main in front, 1 other in front)\n" in said
    found = {}
    for name in physics_targets.TARGETS:
        own = str(manifest.parent / f"train_{name}.csv")
        labels = read_labels(own, own, "regression") if name not in ("contact", "hidden") else None
        lines = [line.rsplit(" ", 1) for line in Path(own).read_text().splitlines()]
        found[name] = {Path(path).stem: [float(x) for x in text.split(",")] for path, text in lines}
        assert labels is None or len(labels.targets) == len(found[name]["0"])
    assert found["position"] == {"0": [0.11, 0.5], "1": [0.21, 0.6], "3": [0.41, 0.8], "4": [0.5, 0.5], "5": [0.5, 0.5]}
    assert found["track"]["0"] == [0.06, 0.5, 0.08, 0.5, 0.11, 0.5, 0.13, 0.5]
    assert found["velocity"]["1"] == pytest.approx([0.22, 1.0])
    # 0.7 seconds from frame 13; none of video 3.
    assert found["contact"] == {name: [pytest.approx(0.7)] for name in "0145"}
    assert found["hidden"] == {"0": [0.13, 0.5], "1": [0.23, 0.6], "4": [0.5, 0.5], "5": [0.5, 0.5]}


def test_classes_of_the_clip(manifest: Path) -> None:
    physics_targets.main([str(manifest), "--frames", "4", "--fps", "6"])
    found = {}
    for name in physics_targets.CLASSES:
        own = str(manifest.parent / f"train_{name}.csv")
        labels = read_labels(own, own)
        assert labels.task == "classification"
        paths, classes = labels.train.videos.paths, labels.train.labels.tolist()
        found[name] = {Path(path).stem: labels.classes[number] for path, number in zip(paths, classes, strict=True)}
    assert found["behind"] == {"0": 3, "1": 3, "3": 2, "4": 3, "5": 3}
    # The other disc of video 4 is near in frame 8 of the clip alone.
    assert found["front"] == {"4": 0, "5": 1}


@pytest.mark.parametrize(
    ("hidden_by", "name"),
    [
        ([None, None], "nothing hidden"),
        ([1, None], "main behind other"),
        ([None, 0], "other behind main"),
        (["screen", None], "main behind screen"),
        (["wall", None], "main behind screen"),
        ([None, "screen"], "other behind screen"),
        (["screen", "screen"], "both hidden"),
        (["screen", 0], "both hidden"),
    ],
)
def test_what_is_hidden_behind_what(hidden_by: list[Any], name: str) -> None:
    assert BEHIND[behind({"hidden_by": [[None, None], hidden_by]}, 1)] == name


def test_what_is_in_front_is_seen_in_the_picture() -> None:
    """In the middle of the overlap is the colour of the disc in front; behind the screen nothing is asked."""
    size, asked, hidden = 96, set(), 0
    for video in range(2, 200, 4):
        scene = simulate(0, 0, video, 36, 12)
        labels = {
            "position": scene.position,
            "radius": scene.radius,
            "front": scene.front.tolist(),
            "present": scene.present,
            "boxes": scene.boxes,
        }
        near = np.flatnonzero(
            np.linalg.norm(scene.position[:, 0] - scene.position[:, 1], axis=1) < scene.radius.sum() - 0.05
        )
        if not len(near):
            continue
        frames = render(scene, 0, 0, video, size)[0].astype(float)
        for t in near:
            first, second = scene.position[t]
            to = (second - first) / np.linalg.norm(second - first)
            # Points of both discs: the farthest that each reaches towards the other, a little within.
            x, y = (first + to * (scene.radius[0] - 0.025)).clip(0, 0.999)
            pixel = frames[t, int(y * size), int(x * size)]
            in_front = front(labels, [t])
            if in_front is None:
                hidden += 1
                continue
            if np.linalg.norm([x, y] - second) < scene.radius[1] - 0.02 and not any(
                left - 0.02 < x < right + 0.02 for left, _, right, _ in scene.boxes.values()
            ):
                assert FRONT[in_front] == ("main in front" if pixel[0] > pixel[2] else "other in front")
                asked.add((video, in_front))
    assert hidden > 10 and {number for _, number in asked} == {0, 1} and len(asked) > 5


def test_discs_that_do_not_overlap() -> None:
    labels = {
        "position": np.array([[[0.3, 0.5], [0.5, 0.5]]]),
        "radius": np.array([0.12, 0.08]),
        "front": [0, 1],
        "present": np.array([[True, True]]),
        "boxes": {},
    }
    assert front(labels, [0]) is None
    closer = {**labels, "radius": np.array([0.12, 0.101])}
    assert front({**labels, "radius": np.array([0.12, 0.099])}, [0]) is None
    assert front(closer, [0]) == 1
    assert front({**closer, "present": np.array([[False, True]])}, [0]) is None
    # The overlap goes from 0.399 to 0.42.
    assert front({**closer, "boxes": {"screen": (0.405, 0.0, 0.5, 1.0)}}, [0]) is None
    assert front({**closer, "boxes": {"screen": (0.415, 0.0, 0.5, 1.0)}}, [0]) == 1
    # One within the other.
    assert front({**closer, "position": np.array([[[0.3, 0.5], [0.3, 0.5]]])}, [0]) == 1


def test_without_labels(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (manifest.parent / "train_labels.json").unlink()
    with pytest.raises(SystemExit, match=r"error: no labels at .*train_labels.json"):
        physics_targets.main([str(manifest)])
