"""The demo's clips: labels fit the pixels, generation is repeatable and survives an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.index import build_index
from vjepa_fast.data.decode.pyav import decode_frames
from vjepa_fast.data.generated import synthetic
from vjepa_fast.data.generated.synthetic import SHAPES, load_labels, make_synthetic, render
from vjepa_fast.data.manifest import load_datasets
from vjepa_fast.evaluation.demo import pixel_features, pooled_pixels
from vjepa_fast.evaluation.linear_probe import r2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_labels_and_manifest_belong_together(tmp_path: Path) -> None:
    made = make_synthetic(tmp_path / "set", 5, 2, seed=3)
    for csv, count in ((made.train_csv, 5), (made.val_csv, 2)):
        (dataset,) = load_datasets(DataConfig(datasets=[str(csv)]))
        labels = load_labels(csv)
        assert len(dataset.paths) == count and set(dataset.paths) == set(labels)
        assert dataset.labels == [labels[path].class_id for path in dataset.paths]
        index = build_index(dataset.paths[0])
        assert (index.num_frames, index.avg_fps, index.height, index.width) == (36, 12.0, 96, 96)
        one = labels[dataset.paths[0]]
        assert one.position.shape == one.velocity.shape == (36, 2) and 0 <= one.class_id < len(SHAPES)
        decoded = decode_frames(dataset.paths[0], index, np.arange(36)).astype(int)
        drawn = render(3, 0 if csv == made.train_csv else 1, 0, 96, 36)[0]
        assert np.abs(decoded - drawn).mean() < 12


def test_labels_are_where_the_main_object_is() -> None:
    """What moved in a frame, weighted by how much, lies around the labelled centre."""
    for video in range(6):
        frames, labels = render(0, 0, video, 96, 36)
        assert frames.dtype == np.uint8
        moved = np.abs(frames.astype(int) - np.median(frames, axis=0)).sum(-1)
        y, x = (np.mgrid[:96, :96] + 0.5) / 96

        def gap(grid: np.ndarray, centre: np.ndarray) -> np.ndarray:
            return (grid[None] - centre[:, None, None] + 0.5) % 1 - 0.5

        near = gap(x, labels.position[:, 0]) ** 2 + gap(y, labels.position[:, 1]) ** 2 < 0.1**2
        assert moved[near].mean() > 2 * moved[~near].mean()
        assert labels.position.min() >= 0 and labels.position.max() < 1
        steps = (np.diff(labels.position, axis=0) + 0.5) % 1 - 0.5
        straight = np.all(np.isclose(labels.velocity[1:], labels.velocity[:-1]), axis=1)
        assert straight.mean() > 0.7 and np.allclose(steps[straight], labels.velocity[:-1][straight])


def test_what_is_drawn_is_varied() -> None:
    everything = [render(0, 0, video, 16, 36)[1] for video in range(200)]
    classes = np.bincount([one.class_id for one in everything], minlength=len(SHAPES))
    assert classes.min() > 30
    velocity = np.stack([one.velocity[0] for one in everything])
    assert np.abs(velocity.mean(axis=0)).max() < 0.006 and velocity.std(axis=0).min() > 0.01
    assert max(np.linalg.norm(one.velocity, axis=1).max() for one in everything) < 0.06
    assert any(not np.allclose(one.velocity[0], one.velocity[-1]) for one in everything)


def test_no_weighted_sum_of_pixels_tells_the_velocity() -> None:
    """Ridge regression on all pixels of a clip, and on its mean tubelet, on other videos."""
    clips, targets = [], []
    for video in range(300):
        frames, labels = render(1, 0, video, 32, 16)
        clips.append(torch.from_numpy(frames[::2]))
        targets.append(labels.velocity[::2].mean(axis=0))
    stacked, y = torch.stack(clips), torch.tensor(np.stack(targets))
    for x in (pooled_pixels(stacked, 2, 8), pixel_features(stacked)):
        assert r2(x[:200], y[:200], x[200:], y[200:]) < 0.1


def test_generation_is_repeatable_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_synthetic(tmp_path / "a", 2, 1)
    make_synthetic(tmp_path / "b", 2, 1)
    made = contents(tmp_path / "a")
    assert made == contents(tmp_path / "b") and len(made) == 8
    # An interrupted generation: no marker, one file missing.
    (tmp_path / "a" / "complete.json").unlink()
    (tmp_path / "a" / "train" / "00001.mp4").unlink()
    make_synthetic(tmp_path / "a", 2, 1)
    assert contents(tmp_path / "a") == made
    # Another recipe in the same folder replaces the old one.
    make_synthetic(tmp_path / "a", 2, 1, seed=1)
    assert contents(tmp_path / "a")["train/00000.mp4"] != made["train/00000.mp4"]
    monkeypatch.setattr(synthetic, "render", lambda *_: pytest.fail("made again"))
    make_synthetic(tmp_path / "a", 2, 1, seed=1)
    with pytest.raises(pytest.fail.Exception):
        make_synthetic(tmp_path / "a", 3, 1, seed=1)
    assert not (tmp_path / "a" / "complete.json").exists()


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*file"):
        make_synthetic(tmp_path / "file" / "set", 1, 1)
    (tmp_path / "list.csv").write_text("a.mp4 0\n")
    with pytest.raises(UserError, match="no labels at .*list_labels.json"):
        load_labels(tmp_path / "list.csv")
    (tmp_path / "list_labels.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match="no labels at"):
        load_labels(tmp_path / "list.csv")
