"""Features on disk: what they are, what makes them others, and a job that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.common.errors import UserError
from vjepa_fast.evaluation import features, views
from vjepa_fast.evaluation.features import Entry, FeatureStore, entries_of
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.inference.videos import list_videos

RULE = ClipRule(8, 8.0, None, (64, 64), segments=2, views=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> InferenceModel:
    return vf.load(checkpoint, predictor=False)


def fill(store: FeatureStore, model: InferenceModel, entries: list[Entry]) -> features.FillProgress:
    return store.fill(entries, model, CPU, [True] * len(entries), 2, 1, lambda progress: None)


def test_entries_are_the_features_of_segments_and_views(model: InferenceModel, videos: Path, tmp_path: Path) -> None:
    listed = list_videos([str(videos)])
    entries = entries_of(listed, [RULE])[0][:2]
    store = FeatureStore(tmp_path / "store", model)
    assert fill(store, model, entries).kept == 0
    again = FeatureStore(tmp_path / "store", model)
    for number, entry in enumerate(entries):
        clips = views.read_views(listed.open(number), RULE, listed.paths[number])
        assert clips.shape == (3, 2, 8, 64, 64, 3)
        expected = torch.stack([model.encode(view).flatten(0, 1) for view in clips])
        assert torch.equal(again.read(f"t.{entry.key}"), expected)
        assert torch.allclose(again.read(f"m.{entry.key}"), expected.mean(1))
    assert fill(again, model, entries).kept == 2


def test_nothing_old_is_read_for_new(checkpoint: Path, model: InferenceModel, videos: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes((videos / "0.mp4").read_bytes())

    def key(rule: ClipRule = RULE) -> str:
        return entries_of(list_videos([str(path)]), [rule])[0][0].key

    first = key()
    assert key() == first
    for change in (
        {"frames": 6},
        {"fps": 4.0},
        {"size": (32, 32)},
        {"segments": 1},
        {"views": 1},
        {"version": 0},
        {"frame_step": 2},
        {"seed": 1},
    ):
        assert key(replace(RULE, **change)) != first, change
    os.utime(path, ns=(1, 1))
    assert key() != first
    # The same weights in another file are the same encoder; others are another, and so is another dtype.
    other = vf.load(checkpoint, predictor=False)
    assert features.encoder_hash(other) == features.encoder_hash(model)
    assert features.encoder_hash(vf.load(checkpoint, weights="encoder")) != features.encoder_hash(model)
    assert features.encoder_hash(vf.load(checkpoint, dtype="bfloat16")) != features.encoder_hash(model)
    with torch.no_grad():
        next(iter(other.encoder.parameters())).view(-1)[0] += 1e-6
    assert features.encoder_hash(other) != features.encoder_hash(model)


def test_a_damaged_part_is_made_again(model: InferenceModel, videos: Path, tmp_path: Path) -> None:
    entries = entries_of(list_videos([str(videos)]), [RULE])[0][:1]
    store = FeatureStore(tmp_path, model)
    fill(store, model, entries)
    (part,) = store.folder.glob("*.safetensors")
    # A new file: the old one is still mapped.
    content = part.read_bytes()
    part.unlink()
    part.write_bytes(content[:1000])
    again = FeatureStore(tmp_path, model)
    assert fill(again, model, entries).kept == 0
    assert torch.equal(again.read(f"t.{entries[0].key}"), store.read(f"t.{entries[0].key}"))


def test_broken_videos_are_named_and_tried_again(model: InferenceModel, videos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    listed = list_videos([str(broken), str(videos / "0.mp4")])
    store = FeatureStore(tmp_path / "store", model)
    assert list(fill(store, model, *entries_of(listed, [RULE])).broken) == [str(broken)]
    broken.write_bytes((videos / "1.mp4").read_bytes())
    after = fill(store, model, *entries_of(listed, [RULE]))
    assert (after.kept, after.broken) == (1, {})


KILLED = """
import sys, time
import torch
import vjepa_fast as vf
from vjepa_fast.evaluation import features
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference import part_files
from vjepa_fast.inference.videos import list_videos

part_files._SECONDS = 0.0
videos = list_videos([sys.argv[2]])
model = vf.load(sys.argv[1], predictor=False)
store = features.FeatureStore(__import__("pathlib").Path(sys.argv[3]), model)
rule = ClipRule(8, 8.0, None, (64, 64), segments=2, views=3)
(entries,) = features.entries_of(videos, [rule])

def report(progress):
    print(progress.done, flush=True)
    if progress.done == 3:
        time.sleep(600)

store.fill(entries, model, torch.device("cpu"), [True] * len(entries), 2, 1, report)
"""


def test_killed_and_started_again(checkpoint: Path, model: InferenceModel, videos: Path, tmp_path: Path) -> None:
    """kill -9 while features are computed: what was done is kept, and the end is that of an undisturbed run."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", KILLED, str(checkpoint), str(videos), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    listed = list_videos([str(videos)])
    (entries,) = entries_of(listed, [RULE])
    store = FeatureStore(tmp_path / "killed", model)
    old, new = (store.folder / f".{name}.{process.pid}.tmp.safetensors" for name in ("old", "new"))
    for leftover in (old, new):
        leftover.write_bytes(b"half of a part")
    os.utime(old, (1, 1))
    store = FeatureStore(tmp_path / "killed", model)
    assert list(store.folder.glob(".*")) == [new]
    progress = fill(store, model, entries)
    # A video is two entries in two parts: the last one may lack the second.
    assert progress.done == 8 and progress.kept in (2, 3)
    whole = FeatureStore(tmp_path / "whole", model)
    assert fill(whole, model, entries).kept == 0
    for entry in entries:
        assert torch.equal(store.read(f"t.{entry.key}"), whole.read(f"t.{entry.key}"))


def test_an_encoder_that_has_diverged(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    broken = vf.load(checkpoint, predictor=False)
    with torch.no_grad():
        next(iter(broken.encoder.parameters())).fill_(torch.nan)
    with pytest.raises(UserError, match="are not finite numbers; most likely the training"):
        fill(FeatureStore(tmp_path, broken), broken, entries_of(list_videos([str(videos)]), [RULE])[0][:1])
