"""Physics clips: laws of motion, labels against the pixels, the same files every time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vjepa_fast as vf
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.index import build_index
from vjepa_fast.data.decode.pyav import decode_frames
from vjepa_fast.data.generated.physics import load_physics_labels, make_physics
from vjepa_fast.data.generated.physics_scenes import KINDS, VIOLATIONS, render, simulate
from vjepa_fast.data.generated.physics_world import World
from vjepa_fast.data.generated.registry import GENERATED
from vjepa_fast.data.manifest import load_datasets


def world(gravity: float, solid: bool = True) -> World:
    return World(
        np.array([0.1, 0.07, 0.12]),
        np.array([[0.2, 0.3], [0.5, 0.6], [0.8, 0.2]]),
        np.array([[0.7, 0.3], [-0.4, 0.9], [-0.5, -0.6]]),
        gravity,
        solid,
        walls=[(0.95, 0.96)],
    )


@pytest.mark.parametrize("gravity", [0.0, 0.8])
def test_energy_is_kept_and_nothing_overlaps(gravity: float) -> None:
    here = world(gravity)
    energy = here.energy()
    for step in range(1, 400):
        here.advance(step / 20)
        assert here.energy() == pytest.approx(energy, rel=1e-9)
        low, high = here.radius[:, None] - 1e-7, 1 - here.radius[:, None] + 1e-7
        assert np.all((here.place > low) & (here.place < high))
        assert np.all(here.place[:, 0] < 0.95 - here.radius + 1e-7)
        for i in range(3):
            for j in range(i):
                assert np.linalg.norm(here.place[i] - here.place[j]) > here.radius[i] + here.radius[j] - 1e-7
    assert min(map(len, here.contacts)) > 5


def test_momentum_is_kept_by_two_discs() -> None:
    here = World(np.array([0.1, 0.05]), np.array([[0.3, 0.5], [0.7, 0.52]]), np.array([[0.5, 0.0], [-0.2, 0.1]]))
    before = (here.mass[:, None] * here.velocity).sum(0)
    was = here.velocity.copy()
    here.advance(0.5)
    assert not np.allclose(here.velocity, was) and len(here.contacts[0]) == len(here.contacts[1]) == 1
    np.testing.assert_allclose((here.mass[:, None] * here.velocity).sum(0), before, rtol=1e-12)


def test_a_fall_is_a_parabola() -> None:
    here = World(np.array([0.1]), np.array([[0.5, 0.2]]), np.array([[0.1, 0.0]]), gravity=0.5)
    here.advance(0.8)
    np.testing.assert_allclose(here.place, [[0.58, 0.2 + 0.5 * 0.5 * 0.8**2]])
    np.testing.assert_allclose(here.velocity, [[0.1, 0.4]])
    down = math.sqrt(2 * 0.7 / 0.5)
    here.advance(2 * down)
    # Back where it fell from, after one contact with the floor.
    np.testing.assert_allclose(here.place[0, 1], 0.2, atol=1e-9)
    assert here.contacts[0] == pytest.approx([down])


def colour(frames: np.ndarray, disc: int) -> np.ndarray:
    """bool, of each pixel: of a disc's colour, red or blue above the other by more than the background has it."""
    wide = frames.astype(float)
    return (wide[..., 0] - wide[..., 2]) * (1 if disc == 0 else -1) > 28


@pytest.mark.parametrize("video", range(8))
def test_labels_are_what_is_seen(video: int) -> None:
    size = 96
    scene = simulate(0, 0, video, 36, 12)
    frames, visible, hidden_by = render(scene, 0, 0, video, size)
    assert scene.kind == KINDS[video % 4] and scene.violation is None and frames.dtype == np.uint8
    at = (np.arange(size) + 0.5) / size
    whole = 0
    for t in range(36):
        for disc in range(2):
            seen = colour(frames[t], disc)
            area = math.pi * (scene.radius[disc] * size) ** 2
            if visible[t, disc] == 1:
                centre = [(seen.sum(0) * at).sum() / seen.sum(), (seen.sum(1) * at).sum() / seen.sum()]
                assert np.abs(centre - scene.position[t, disc]).max() < 0.5 / size
                whole += 1
            # Within the rim, where pixels are mixed.
            assert abs(seen.sum() - visible[t, disc] * area) < 0.15 * area
            assert (hidden_by[t][disc] is None) == (visible[t, disc] >= 0.5)
    assert whole >= 2


def test_velocity_and_time_to_contact() -> None:
    for video in range(8):
        scene = simulate(1, 0, video, 60, 240)
        steps = np.diff(scene.position, axis=0) * 240
        middle = (scene.velocity[1:] + scene.velocity[:-1]) / 2
        # Between contacts; a parabola's mean velocity is that of its middle.
        free = scene.contact_in[:-1] > 1 / 240 + 1e-9
        np.testing.assert_allclose(steps[free], middle[free], atol=1e-8)
        later = scene.contact_in[:-1][free] - scene.contact_in[1:][free]
        np.testing.assert_allclose(later, 1 / 240, atol=1e-9)
        assert np.all(scene.contact_in > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be(kind: str) -> None:
    """Up to its frame, the impossible video is the possible one; what happens then is what its label says."""
    found = set()
    for number in range(KINDS.index(kind), 60, 4):
        right, wrong = (simulate(0, 2, number, 36, 12, impossible) for impossible in (False, True))
        if wrong.violation is None:
            continue
        name, frame = wrong.violation
        found.add(name)
        np.testing.assert_array_equal(right.position[:frame], wrong.position[:frame])
        assert right.present[:frame].all() and wrong.present[:frame].all()
        step = np.abs(wrong.position[frame, 0] - wrong.position[frame - 1, 0]).max()
        if name == "vanish":
            assert not wrong.present[frame:, 0].any()
        elif name == "jump":
            assert step > 0.1
        else:
            left, _, wall_right, _ = wrong.boxes["wall"]
            x = wrong.position[frame, 0, 0]
            assert left - wrong.radius[0] < x < wall_right + wrong.radius[0]
    assert found == set(VIOLATIONS[kind])


def test_hidden_behind_a_screen_and_behind_the_other() -> None:
    names: set[object] = set()
    for video in range(2, 80, 4):
        scene = simulate(0, 0, video, 36, 12)
        names |= {name for row in render(scene, 0, 0, video, 32)[2] for name in row}
    assert {"screen", None} <= names and names & {0, 1}


def test_files_and_labels(tmp_path: Path) -> None:
    made = make_physics(tmp_path / "a", 4, 1, 2, size=64, num_frames=8)
    (dataset,) = load_datasets(DataConfig(datasets=[str(made.train_csv)]))
    labels = load_physics_labels(made.train_csv)
    assert list(dataset.paths) == list(labels) and dataset.labels == [0, 1, 2, 3]
    entry = labels[dataset.paths[2]]
    assert entry["position"].shape == (8, 2, 2) and entry["contact_in"].shape == entry["visible"].shape == (8, 2)
    scene = simulate(0, 0, 2, 8, 12)
    np.testing.assert_allclose(entry["position"], scene.position, atol=1e-6)
    index = build_index(dataset.paths[2])
    decoded = decode_frames(dataset.paths[2], index, np.arange(8)).astype(int)
    assert np.abs(decoded - render(scene, 0, 0, 2, 64)[0]).mean() < 12
    surprise = json.loads((tmp_path / "a" / "surprise_labels.json").read_text())
    assert [entry["violation"] is None for entry in surprise.values()] == [True, False]
    # Again: the same bytes, by the command line and in another process.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "vjepa_fast.data.physics",
            "--out",
            str(tmp_path / "b"),
            "--train",
            "4",
            "--val",
            "1",
            "--surprise",
            "2",
            "--size",
            "64",
            "--frames",
            "8",
        ],
        check=True,
        capture_output=True,
    )
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    made = make_physics(tmp_path, 1, 0, size=32, num_frames=2)
    video = tmp_path / "train" / "00000.mp4"
    stamp = video.stat().st_mtime_ns
    assert make_physics(tmp_path, 1, 0, size=32, num_frames=2) == made and video.stat().st_mtime_ns == stamp
    make_physics(tmp_path, 1, 0, size=32, num_frames=3)
    assert build_index(str(video)).num_frames == 3


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an even size"):
        make_physics(tmp_path, 1, 1, size=33)
    with pytest.raises(UserError, match="no labels at"):
        load_physics_labels(tmp_path / "train.csv")


def test_names_in_datasets() -> None:
    assert set(GENERATED) == {"synthetic:", "physics:"}


@pytest.mark.parametrize("value", ["[physics:]", "physics:", '["physics:"]'])
def test_a_name_with_a_colon_needs_no_quotes(value: str) -> None:
    cfg = vf.load_recipe("demo", [f"data.datasets={value}"])
    assert cfg.data.datasets == ["physics:"]
