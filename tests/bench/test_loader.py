"""What `vjepa-fast bench --loader` makes of a user's files: sound, broken, few, too long; and that it cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vjepa_fast.bench import sample as sampled
from vjepa_fast.bench.loader import add_need, describe_need, measure_loader
from vjepa_fast.bench.sample import open_sample
from vjepa_fast.bench.timing import ROOT
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.decode.dali import missing
from vjepa_fast.data.generated.synthetic import make_synthetic
from vjepa_fast.data.pack.index import PackSettings
from vjepa_fast.data.pack.writer import make_pack
from vjepa_fast.data.workers import available_cores

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    make_synthetic(folder, 3, 1, size=48, num_frames=40, fps=10)
    return sorted(map(str, folder.rglob("*.mp4")))[:3]


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    return DataConfig(dataset_fpcs=[4], batch_size=4, crop_size=32, num_workers=0, cache_dir=tmp_path / "cache")


def manifest(folder: Path, paths: list[str]) -> str:
    np.save(folder / "list.npy", np.array(paths, dtype=str))
    return str(folder / "list.npy")


def test_broken_videos_are_left_out_and_named(videos: list[str], cfg: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    broken = [str(tmp_path / "empty.mp4"), str(tmp_path / "gone.mp4")]
    said: list[str] = []
    found = measure_loader(manifest(tmp_path, [*videos, *broken]), None, cfg, CPU, 1, said.append)
    assert found["sample"] == {"num_listed": 5, "num_tried": 5, "num_used": 3, "num_broken": 2}
    assert "2 of the 5 videos that were tried cannot be read and are left out:" in said
    assert f"  {broken[0]}: the file is empty" in said and f"  {broken[1]}: the file does not exist" in said
    assert any("3 videos are fewer than the 4 clips of a batch" in line for line in said)
    assert found["pack"]["num_videos"] == 3 and found["pack"]["num_broken"] == 0
    rows = [row for row in found["rows"] if row["backend"] == "pyav"]
    assert [row["format"] for row in rows] == ["videos", "pack"]
    assert all(row["notes"] == [] and row["core_ms_per_clip"] > 0 for row in rows)
    assert [row.get("error") for row in found["rows"] if row["backend"] == "dali"] == [missing(CPU)] * 2
    assert os.listdir(tmp_path / "cache") == ["index"]
    with pytest.raises(UserError, match="none of the 2 videos .* can be read") as error:
        measure_loader(manifest(tmp_path, broken), None, cfg, CPU, 1)
    assert "the file is empty" in str(error.value) and os.listdir(tmp_path / "cache") == ["index"]


def test_a_film_is_not_packed(
    videos: list[str], cfg: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "_PACK_SECONDS", 1e-6)
    found = measure_loader(manifest(tmp_path, videos), None, cfg, CPU, 1)
    assert "pack" not in found
    failed, *others = found["rows"]
    assert failed["format"] == "pack" and "--pack names a pack" in failed["error"]
    assert [row["format"] for row in others] == ["videos", "videos"] and others[0]["clips_per_s"] > 0


def test_a_pack_that_is_there(videos: list[str], cfg: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    make_pack(videos, [0] * 3, folder, PackSettings(short_side=32), num_workers=1)
    alone = measure_loader(str(folder), None, cfg, CPU, 1)
    assert [row["format"] for row in alone["rows"]] == ["pack", "pack"] and "sample" not in alone
    both = measure_loader(manifest(tmp_path, videos), str(folder), cfg, CPU, 1)
    assert [row["format"] for row in both["rows"]] == ["videos", "videos", "pack", "pack"] and "pack" not in both
    with pytest.raises(UserError, match="is no pack; expected"):
        measure_loader(manifest(tmp_path, videos), str(tmp_path), cfg, CPU, 1)
    with pytest.raises(ConfigError, match="holds 4 frames a second"):
        measure_loader(str(folder), None, cfg.model_copy(update={"fps": 10.0}), CPU, 1)


@dataclass(frozen=True)
class Length:
    """A video of which only the size matters."""

    num_frames: int
    height: int = 360
    width: int = 640
    avg_fps: float = 30.0
    path: str = ""
    is_image: bool = False


def test_what_is_packed_fits_time_and_space() -> None:
    settings, seconds = PackSettings(), 300 * 360 * 640 / sampled._PIXELS_PER_CORE_SECOND
    films: list[Any] = [Length(300_000), Length(300), Length(900)]
    assert sampled._affordable(films, settings, 1) == [1, 2]
    short: list[Any] = [Length(300)] * 500
    assert len(sampled._affordable(short, settings, 1)) == int(sampled._PACK_SECONDS / seconds)
    assert len(sampled._affordable(short, settings, 1000)) == sampled._MAX_PACKED
    # Few pixels a second, but many frames that are kept.
    stills: list[Any] = [Length(2000, avg_fps=1.0)] * 500
    taken = sampled._affordable(stills, settings, 1000)
    assert 0 < len(taken) * 2000 * 256 * 448 * sampled._BYTES_PER_PIXEL <= sampled._PACK_BYTES


def test_the_sample_is_bounded_and_spread(
    videos: list[str], cfg: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "_MAX_VIDEOS", 6)
    name = manifest(tmp_path, videos * 20)
    found = open_sample(name, cfg)
    assert found.num_listed == 60 and len(found.paths) == 6 and len(set(found.paths)) > 1
    monkeypatch.setattr(sampled, "_OPEN_SECONDS", -1.0)
    assert len(open_sample(name, cfg).paths) == 1


def test_what_the_step_needs() -> None:
    row = {"format": "pack", "backend": "pyav", "clips_per_s": 50.0, "core_ms_per_clip": 10.0}
    loader: dict[str, Any] = {"rows": [row, {"format": "pack", "backend": "dali", "error": "DALI is not installed"}]}
    gpu = torch.device("cuda")
    add_need(loader, 200.0, gpu)
    assert (loader["step_ms_per_clip"], row["waits"]) == (5.0, 0.75)
    assert describe_need(loader, gpu) == [
        "the step takes 5.0 ms a clip here, so it needs 200.0 clips/s",
        "pack, PyAV: has 50.0 clips/s, the step would wait 75.0 % of the time",
    ]
    add_need(loader, 40.0, gpu)
    assert row["waits"] == 0
    add_need(loader, 200.0, CPU)
    assert row["waits"] == pytest.approx(10 / available_cores() / (10 / available_cores() + 5))


def test_interrupted_nothing_stays(videos: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vjepa_fast",
        "bench",
        "--size",
        "trial",
        "--device",
        "cpu",
        "--rounds",
        "8",
        "--loader",
        manifest(tmp_path, videos),
        "--out",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # A shell that starts something in the background has it ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "videos, PyAV" in line:
                break
        # As from a terminal: to all processes.
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 130, said
    assert "interrupted" in said and "Traceback" not in said
    assert os.listdir(tmp_path / "cache" / "vjepa_fast") == ["index"] and os.listdir(tmp_path / "out") == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
