"""`vjepa-fast masks`: the masks are those of training, the figures printed are theirs, and mistakes get a sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from vjepa_fast.cli.main import app
from vjepa_fast.config import Config, load_recipe
from vjepa_fast.masking import picture
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import StepMasks


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["masks", *args], prog_name="vjepa-fast", env={"COLUMNS": "200", "NO_COLOR": "1"})


class Drawn:
    """Stands in for the picture, which takes a while, and keeps what it was made of."""

    def draw(self, panels: list[picture.Panel], title: str, facts: list[str], out: Path) -> None:
        self.panels, self.title, self.facts = panels, title, facts
        out.touch()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drawn:
    stand_in = Drawn()
    monkeypatch.setattr(picture, "draw", stand_in.draw)
    monkeypatch.chdir(tmp_path)
    return stand_in


def step_masks(cfg: Config, rank: int = 0, world_size: int = 1, fpcs: list[int] | None = None) -> StepMasks:
    """As the trainer makes them."""
    data = cfg.data
    return StepMasks(
        cfg.mask,
        fpcs=fpcs or data.dataset_fpcs,
        crop_size=data.crop_size,
        patch_size=data.patch_size,
        tubelet_size=data.tubelet_size,
        seed=cfg.train.seed,
        global_batch=data.per_process(world_size) * world_size,
        group_of=np.zeros_like,
        rank=rank,
        world_size=world_size,
    )


def same(one: MaskBatch, other: MaskBatch) -> bool:
    return (
        torch.equal(one.context_ids, other.context_ids)
        and torch.equal(one.target_ids, other.target_ids)
        and one.context_lengths == other.context_lengths
        and one.grid == other.grid
    )


def printed_shares(text: str) -> list[tuple[float, float]]:
    return [(float(c), float(t)) for c, t in re.findall(r"context ([\d.]+) %, target ([\d.]+) % of", text)]


def test_without_data(tmp_path: Path) -> None:
    out = tmp_path / "m.png"
    result = invoke("--recipe", "vitl16-256", "--out", str(out), "--samples", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["m.png"]
    lines = result.stdout.splitlines()
    assert lines[0].startswith("mask 0 (8 blocks of 0.15): context ") and lines[0].endswith("mean over 24 clips")
    assert lines[1].startswith("mask 1 (2 blocks of 0.7): context ")
    assert lines[2:] == [f"picture {out}"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_masks_of_training(world_size: int, drawn: Drawn) -> None:
    cfg = load_recipe("vitl16-256")
    result = invoke("--recipe", "vitl16-256", "--step", "7", "--nproc", str(world_size), "--samples", "2")
    assert result.exit_code == 0, result.output
    ranks = []
    for rank in range(world_size):
        ids = torch.arange(24) + (7 * world_size + rank) * 24
        ranks += step_masks(cfg, rank, world_size)(7, [ids], [0])
    (panel,) = drawn.panels
    assert list(panel.sample_ids) == [7 * world_size * 24, 7 * world_size * 24 + 1]
    assert same(panel.masks, ranks[0].narrow(0, 2))
    shares = [np.mean([picture.mean_shares(batch, mask) for batch in ranks], axis=0) for mask in range(2)]
    assert printed_shares(result.stdout) == [(round(100 * c, 1), round(100 * t, 1)) for c, t in shares]
    assert drawn.title == "Masks of vitl16-256, step 7, seed 239"
    assert "8 x 16 x 16" in drawn.facts[0] and "shortest of its 24" in drawn.facts[1]
    assert "2 processes" in drawn.facts[1] or world_size == 1


def test_seed_and_overrides_count(drawn: Drawn) -> None:
    pictures = []
    for args in ([], ["train.seed=1"], ["mask.masks=[{strategy: future, ratio: 0.25}]"]):
        assert invoke(*args).exit_code == 0
        pictures.append(drawn.panels[0])
    assert not same(pictures[0].masks, pictures[1].masks)
    future = picture.roles(pictures[2].masks, 0, 0)
    assert (future[:3] == picture.CONTEXT).all() and (future[3:] == picture.TARGET).all()
    assert pictures[2].names == ["future 0.25"] and "nothing is truncated" in drawn.facts[1]


def test_reference_stream(drawn: Drawn) -> None:
    args = ["mask.source=reference", "mask.truncate=batch_min"]
    assert invoke(*args, "--step", "2").exit_code == 0
    stream = step_masks(load_recipe("demo", args))
    for step in range(3):
        (batch,) = stream(step, [torch.arange(16) + step * 16], [0])
    assert same(drawn.panels[0].masks, batch.narrow(0, 3))
    assert "reference" in drawn.facts[1]


def test_groups_of_frames_per_clip(drawn: Drawn, tmp_path: Path) -> None:
    from vjepa_fast.data.loader import build_loader

    for name, count in (("a", 3), ("b", 5)):
        (tmp_path / f"{name}.csv").write_text("".join(f"{name}{i}.mp4 0\n" for i in range(count)))
    args = ["data.datasets=[a.csv, b.csv]", "data.dataset_fpcs=[4, 8]", "data.datasets_weights=[0.5, 0.5]"]
    (tmp_path / "a0.mp4").touch()
    (tmp_path / "b0.mp4").touch()
    result = invoke(*args, "--samples", "2", "--step", "1")
    assert result.exit_code == 0, result.output
    cfg = load_recipe("demo", args)
    ids = np.arange(16, 32)
    groups = build_loader(cfg.data).group_of(ids)
    assert 0 < groups.sum() < 16
    for group, panel in enumerate(drawn.panels):
        assert list(panel.sample_ids) == ids[groups == group][:2].tolist()
        assert panel.masks.grid == ((2, 6, 6), (4, 6, 6))[group]
        assert panel.heading == f"clips of {(4, 8)[group]} frames"
        assert f"{(4, 8)[group]} frames, mask 0" in result.stdout


def write_video(path: Path, num_frames: int) -> None:
    """Frame i has the brightness 40 + 4 i, at 12 frames a second, wider than high."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=12, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((48, 96, 3), 40 + 4 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("num_frames", [50, 6])
def test_frames_of_a_video(num_frames: int, drawn: Drawn, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", num_frames)
    result = invoke("--video", "v.mp4", "data.cache_dir=cache", "--samples", "2", "train.seed=1")
    assert result.exit_code == 0, result.output
    clip = drawn.panels[0].frames[1]
    assert clip.shape == (4, 228, 228, 3)
    # 8 frames at half the rate, of which every other one is the first of a token.
    numbers = np.floor(np.linspace(0, 16, 8))[::2] if num_frames == 50 else np.array([0, 5, 5, 5])
    np.testing.assert_allclose(clip.mean((1, 2, 3)), 40 + 4 * numbers, atol=2.5)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--samples", "17"], 2, "--samples is 17, but a step has 16 clips"),
        (["--samples", "0"], 2, "--samples"),
        (["--step", "-1"], 2, "--step"),
        (["--out", "m.jpg"], 2, "--out is m.jpg; expected a name that ends in .png or .pdf or .svg"),
        (["--out", "nowhere/m.png"], 1, "cannot write nowhere/m.png: No such file"),
        (["--video", "nowhere.mp4"], 1, "--video nowhere.mp4: the file does not exist"),
        (["--video", "text.mp4"], 1, "--video text.mp4: "),
        (["mask.source=reference"], 2, "mask.truncate=batch_min"),
        (["mask.source=reference", "mask.truncate=batch_min", "--nproc", "2"], 2, "stream of one process"),
        (["--nproc", "3"], 2, "not a multiple of 3 processes"),
        (["data.datasets=[]", "data.dataset_fpcs=[4, 8]"], 2, "the datasets decide which clips have how many frames"),
        (["mask.group_size=5", "mask.truncate=batch_min"], 2, "mask.group_size=5 does not divide"),
        (["data.global_batch_size=400", "--samples", "400"], 2, "--samples 400 makes 400 rows"),
        (["vitl16-256"], 2, "did you mean --recipe vitl16-256?"),
        (["--recipe", "demo", "--config", "x.yaml"], 2, "--recipe and --config are both given"),
    ],
)
def test_mistakes(args: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    result = invoke(*args, "data.cache_dir=cache")
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert not list(tmp_path.glob("*.png"))


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, vjepa_fast.cli.main as m; m.app(['masks', '--help'], standalone_mode=False); "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'matplotlib', 'av')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for word in (
        "--recipe",
        "--config",
        "--out",
        "--samples",
        "--step",
        "--nproc",
        "--video",
        "KEY=VALUE",
        "Examples:",
        "Exit codes:",
    ):
        assert word in result.stdout, word
