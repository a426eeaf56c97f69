"""`vjepa-fast embed`: features of videos, stopped and continued, with broken files among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import vjepa_fast as vf
from tests.checkpoints import models
from tests.data.conftest import write_video
from vjepa_fast.cli.main import app
from vjepa_fast.inference import part_files
from vjepa_fast.inference import videos as inference_videos
from vjepa_fast.inference.model import InferenceModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five videos of 24 frames a second, of different lengths and sizes; the third is broken."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, frames in enumerate((40, 10, 3, 30, 26)):
        write_video(folder / f"{number}.mp4", num_frames=frames, preset="ultrafast", width=96 if number % 2 else 64)
    (folder / "2.mp4").write_bytes(b"no video")
    return folder


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["embed", *map(str, args)])


def read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_folder(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    result = run(videos, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 0, result.output
    assert "4 videos, 64 x 96 each, float32, of the target_encoder" in result.output
    assert "1 of 5 videos could not be read and were left out" in result.output
    found = read(out)
    assert list(found) == [str(videos / f"{number}.mp4") for number in (0, 1, 3, 4)]
    assert {value.shape for value in found.values()} == {(64, 96)}
    assert str(videos / "2.mp4") in (tmp_path / "features.broken.tsv").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache",
        "features.broken.tsv",
        "features.safetensors",
        "videos",
    ]
    # Read by hand: 8 frames, every third of 24 a second, from the middle; the middle 7/8 of the short side.
    model = vf.load(checkpoint)
    sampling = inference_videos.default_sampling(model, None, None, None, 1)
    assert (sampling.frames, sampling.fps, sampling.size) == (8, 8, (64, 64))
    path = videos / "0.mp4"
    clip = inference_videos.read_clips(inference_videos.list_videos([str(path)]).open(0), sampling)
    assert torch.equal(found[str(path)], model.encode(clip)[0])


def test_what_is_seen_of_a_video(videos: Path) -> None:
    from vjepa_fast.data.decode.pyav import decode_clip
    from vjepa_fast.data.decode.request import ClipRequest
    from vjepa_fast.data.sampling import Box

    path = str(videos / "0.mp4")
    source = inference_videos.list_videos([path]).open(0)
    sampling = inference_videos.Sampling(8, 8.0, (64, 64), clips=3)
    clips = inference_videos.read_clips(source, sampling)
    assert clips.shape == (3, 8, 64, 64, 3)
    # 40 frames, a window of 24: it begins at 0, 8 and 16.
    for clip, start in zip(clips, (0, 8, 16), strict=True):
        numbers = np.clip(np.linspace(start, start + 24, 8), 0, start + 23).astype(int)
        # 48 x 64 pixels: a square of 7/8 of the height.
        assert torch.equal(clip, decode_clip(ClipRequest(source, numbers, Box(3, 11, 42, 42), (64, 64), False)))
    middle = inference_videos.read_clips(source, inference_videos.Sampling(8, 8.0, (64, 64)))
    assert torch.equal(middle[0], clips[1])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_options(suffix: str, checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    (videos / "list.csv").write_text("0.mp4 7\n0.mp4 7\n4.mp4 8\n")
    out = tmp_path / f"f{suffix}"
    result = run(
        videos / "list.csv",
        videos / "0.mp4",
        "--checkpoint",
        checkpoint,
        "--out",
        out,
        "--pool",
        "mean",
        "--frames",
        4,
        "--fps",
        12,
        "--size",
        32,
        "--clips",
        2,
        "--dtype",
        "bfloat16",
        "--batch-size",
        3,
        "--weights",
        "encoder",
    )
    assert result.exit_code == 0, result.output
    names = [str(videos / "0.mp4"), str(videos / "4.mp4")]
    if suffix == ".npz":
        with np.load(out) as file:
            assert sorted(file) == names and {file[name].shape for name in names} == {(2, 96)}
            assert file[names[0]].dtype == np.float32
        assert "2 x 96 each, float32, of the encoder" in result.output
        return
    found = read(out)
    assert list(found) == names and found[names[0]].shape == (2, 96) and found[names[0]].dtype == torch.bfloat16
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["labels"]) == dict(zip(names, (7, 8), strict=True))
    assert json.loads(metadata["settings"])["fps"] == 12


def test_batches_do_not_change_features(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    found = []
    for batch_size in (1, 3):
        out = tmp_path / f"{batch_size}.safetensors"
        assert run(videos, "--checkpoint", checkpoint, "--out", out, "--batch-size", batch_size).exit_code == 0
        found.append(read(out))
    for key, value in found[0].items():
        assert (value - found[1][key]).abs().max() <= 1e-5


def test_parts_that_another_process_has_written(
    checkpoint: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, out = inference_videos.EmbedJob._finish, tmp_path / "f.safetensors"

    def disturbed(job: inference_videos.EmbedJob) -> Any:
        save_file({str(videos / "0.mp4"): torch.zeros(2)}, job._parts[0])
        return original(job)

    with monkeypatch.context() as patched:
        patched.setattr(inference_videos.EmbedJob, "_finish", disturbed)
        result = run(videos, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 1 and not out.exists()
    assert f"f.safetensors.parts lacks 3 videos that were done, such as {videos / '1.mp4'}" in result.output
    assert run(videos, "--checkpoint", checkpoint, "--out", out).exit_code == 0
    assert len(read(out)) == 4


def test_interrupted_and_continued(
    checkpoint: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "2.mp4").unlink()
    whole = tmp_path / "whole.safetensors"
    assert run(videos, "--checkpoint", checkpoint, "--out", whole).exit_code == 0
    encode, out = InferenceModel.encode, tmp_path / "f.safetensors"
    calls = []

    def stops(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(InferenceModel, "encode", stops)
    result = run(videos, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 130 and not out.exists()
    assert "2 of 4 videos are done and kept; run the same command to continue" in result.output
    # Something else is not mixed in.
    result = run(videos, "--checkpoint", checkpoint, "--out", out, "--fps", 3)
    assert result.exit_code == 2 and "had fps=8.0, now 3.0" in result.output
    result = run(videos / "0.mp4", "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 2 and "had other videos" in result.output
    result = run(videos, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 0 and "resuming: 2 of 4 videos were done before" in result.output
    assert len(calls) == 5
    continued, straight = read(out), read(whole)
    assert list(continued) == list(straight)
    assert all(torch.equal(continued[key], straight[key]) for key in straight)
    assert not [path for path in tmp_path.iterdir() if "parts" in path.name]
    result = run(videos, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 2 and "exists; give another --out" in result.output


def test_parts_are_written_as_it_goes(
    checkpoint: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kill -9 leaves behind: everything but the last part."""
    monkeypatch.setattr(part_files, "_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "rmtree", lambda *_: None)
    out = tmp_path / "f.safetensors"
    assert run(videos, "--checkpoint", checkpoint, "--out", out).exit_code == 0
    parts = sorted(path.name for path in (tmp_path / ".f.safetensors.parts").iterdir())
    assert parts == [*(f"{number:06d}.safetensors" for number in range(4)), "broken.json", "settings.json"]


def test_images_and_errors(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((50, 70, 3), 128, dtype=np.uint8)).save(videos / "a.png")
    result = run(videos / "a.png", "--checkpoint", checkpoint, "--out", tmp_path / "f.npz")
    assert result.exit_code == 0 and "1 video, 64 x 96 each" in result.output
    for args, code, said in (
        ((videos / "2.mp4", "--checkpoint", checkpoint, "--out", tmp_path / "g.npz"), 1, "none of the 1 videos"),
        (("gone.mp4", "--checkpoint", checkpoint, "--out", tmp_path / "g.npz"), 1, "'gone.mp4' does not exist"),
        ((videos, "--checkpoint", checkpoint, "--config", "gone.yaml", "--out", tmp_path / "g.npz"), 2, "gone.yaml"),
        ((videos, "--checkpoint", videos, "--out", tmp_path / "g.npz"), 1, "holds no checkpoint"),
        ((videos, "--checkpoint", checkpoint, "--out", tmp_path / "g.pt"), 2, "ends in .safetensors or .npz"),
        ((videos, "--checkpoint", checkpoint, "--out", tmp_path / "g.npz", "--size", 8), 2, "at least 16 pixels"),
        ((videos, "--checkpoint", checkpoint, "--out", tmp_path / "g.npz", "--set", "heads"), 2, "after --set"),
        ((videos, "--checkpoint", checkpoint, "--out", "/proc/x/g.npz"), 1, "cannot write /proc/x/g.npz"),
    ):
        result = run(*args)
        assert result.exit_code == code and said in result.output, result.output
    if not torch.cuda.is_available():
        result = run(videos, "--checkpoint", checkpoint, "--out", tmp_path / "g.npz", "--device", "cuda")
        assert result.exit_code == 2 and "finds no usable GPU" in result.output
