"""DALI on the CPU against PyAV; samples on which it gives up; what it is not given."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import vjepa_fast
from tests.data.decode.dali_cases import CPU, jpegs, needs_dali, run
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import AugmentationConfig, DataConfig
from vjepa_fast.data.decode import dali
from vjepa_fast.data.decode.choose_backend import choose
from vjepa_fast.data.decode.dali import DaliPreparer, EncodedClip
from vjepa_fast.data.decode.dali_pipelines import DaliFinisher
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.pyav import decode_clip
from vjepa_fast.data.decode.request import ClipRequest, open_source
from vjepa_fast.data.loader import Batch, build_loader
from vjepa_fast.data.sampling import Box

VP9: dict[str, Any] = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "12"}
MJPEG: dict[str, Any] = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Six VP9 and two MJPEG videos with list.csv, and two of H.264 with others.csv."""
    from tests.data.conftest import write_video

    folder = tmp_path_factory.mktemp("dali")
    lines = []
    for number in range(8):
        name, options = (f"{number}.webm", VP9) if number < 6 else (f"{number}.avi", MJPEG)
        write_video(folder / name, num_frames=30 + number, **options)
        lines.append(f"{name} {number}\n")
    (folder / "list.csv").write_text("".join(lines))
    for number in range(2):
        write_video(folder / f"{number}.mp4", num_frames=30, g="12")
    (folder / "others.csv").write_text("0.mp4 10\n1.mp4 11\n")
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        return DataConfig(
            **{
                "datasets": [str(folder / "list.csv")],
                "batch_size": 4,
                "dataset_fpcs": [4],
                "crop_size": 32,
                "fps": 8.0,
                "num_workers": 0,
                "cache_dir": tmp_path / "cache",
                "backend": "dali",
                "dali_threads": 1,
                **changes,
            }
        )

    return make


def collect(cfg: DataConfig, num_steps: int, start_step: int = 0) -> list[Batch]:
    with build_loader(cfg, num_steps=num_steps, start_step=start_step) as loader:
        return list(loader)


def stated_colours(path: Path) -> np.ndarray:
    """DALI's colours: BT.601 by the stream's range, chroma interpolated between the centres of 2 x 2 pixels."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    full = frames[0].format.name == "yuvj420p"
    planes = torch.from_numpy(np.stack([frame.to_ndarray() for frame in frames])).double()
    height, width = frames[0].height, frames[0].width
    luma, chroma = planes[:, :height], planes[:, height:].reshape(len(frames), 2, height // 2, width // 2)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False) - 128
    if not full:
        luma, chroma = (luma - 16) * 255 / 219, chroma * 255 / 224
    blue, red = chroma.unbind(1)
    rgb = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return torch.stack(rgb, dim=-1).clamp(0, 255).round().numpy()


def mean_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().mean())


@needs_dali
@pytest.mark.parametrize("name", ["5.webm", "7.avi"])
def test_frames_are_those_that_pyav_gives(name: str, folder: Path, tmp_path: Path) -> None:
    """Whole frames, any order, repeats: each one is nearest to the frame that was asked for."""
    source = open_source(str(folder / name), tmp_path)
    box, size = Box(0, 0, 48, 64), (48, 64)
    every = decode_clip(ClipRequest(source, np.arange(source.num_frames), box, size, False))
    rng = np.random.default_rng(1)
    wanted = [rng.integers(0, source.num_frames, 6) for _ in range(3)]
    wanted += [np.arange(20, 26), np.array([9, 9, 3, 3, 9, 9])]
    exact = stated_colours(folder / name)
    clips = run([ClipRequest(source, numbers, box, size, False) for numbers in wanted])
    for clip, numbers in zip(clips, wanted, strict=True):
        for frame, number in zip(clip, numbers.tolist(), strict=True):
            distances = (every.float() - frame.float()).abs().mean(dim=(1, 2, 3))
            assert int(distances.argmin()) == number
            assert distances[number] < 4
            assert np.abs(frame.numpy().astype(int) - exact[number]).max() <= 1


@needs_dali
def test_grey_video_differs_by_rounding_alone(tmp_path: Path) -> None:
    """Without colour there is no chroma to interpolate: what is left is crop, resize, flip and the luma scale."""
    path = tmp_path / "grey.webm"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=24, options={"deadline": "realtime", "cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        y, x = np.mgrid[:96, :128]
        for number in range(20):
            luma = (40 + 60 * np.sin((x + 3 * number) / 9) + 60 * np.cos(y / 7) + 60).clip(16, 235)
            planes = np.full((144, 128), 128, dtype=np.uint8)
            planes[:96] = luma
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    source = open_source(str(path), tmp_path)
    for flip in (False, True):
        request = ClipRequest(source, np.array([2, 5, 11, 19]), Box(7, 13, 70, 90), (32, 48), flip)
        difference = (run([request])[0].int() - decode_clip(request).int()).abs()
        assert int(difference.max()) <= 3 and float(difference.float().mean()) < 1


@needs_dali
def test_loader_gives_what_pyav_gives(config: Callable[..., DataConfig]) -> None:
    for ours, other in zip(collect(config(), 4), collect(config(backend="pyav"), 4), strict=True):
        assert ours.step == other.step and ours.labels == other.labels and ours.group_ids == other.group_ids
        assert torch.equal(ours.sample_ids[0], other.sample_ids[0])
        (clips,) = ours.clips
        assert clips.shape == (4, 4, 32, 32, 3) and clips.dtype == torch.uint8 and clips.is_contiguous()
        for clip, reference in zip(clips, other.clips[0], strict=True):
            assert mean_difference(clip, reference) < 4
            assert mean_difference(clip, reference) < mean_difference(clip, reference.flip(2))


@needs_dali
def test_resume_and_workers_change_nothing(config: Callable[..., DataConfig]) -> None:
    whole = collect(config(), 5)
    later = collect(config(), 2, start_step=3)
    with_worker = collect(config(num_workers=1, device_prefetch=1), 5)
    for left, right in [*zip(whole[3:], later, strict=True), *zip(whole, with_worker, strict=True)]:
        assert left.step == right.step and left.labels == right.labels
        assert torch.equal(left.clips[0], right.clips[0])


@needs_dali
def test_output_is_not_copied_and_not_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(folder / "3.webm"), tmp_path)
    requests = [ClipRequest(source, np.arange(4) + shift, Box(0, 0, 48, 64), (32, 32), False) for shift in range(8)]
    preparer, finisher = DaliPreparer(on_gpu=False), DaliFinisher(CPU, (32, 32), 2, 1, 1, False)
    pointers: list[int] = []
    original = DaliFinisher._output

    def output(self: DaliFinisher, run: Any) -> Any:
        tensors = original(self, run)
        pointers.append(tensors.as_tensor().data_ptr())
        return tensors

    monkeypatch.setattr(DaliFinisher, "_output", output)
    kept, copies = [], []
    for first in range(0, 8, 2):
        batch = preparer.collate([preparer.prepare(request) for request in requests[first : first + 2]])
        clips = finisher.wait(finisher.start(batch)).clips
        assert clips.data_ptr() == pointers[-1]
        kept.append(clips)
        copies.append(clips.clone())
    assert all(map(torch.equal, kept, copies)) and len(set(pointers)) == 4


def spoiled(videos: set[int]) -> Callable[[Any, ClipRequest], Any]:
    """A preparer's method that hands on rubbish for some videos, as no check of ours would let through."""
    original = DaliPreparer.prepare

    def prepare(self: DaliPreparer, request: ClipRequest) -> Any:
        clip = original(self, request)
        if int(Path(request.source.path).stem) in videos:
            assert isinstance(clip, EncodedClip)
            clip = clip._replace(files=[os.urandom(500)])
        return clip

    return prepare


@needs_dali
@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_sample_is_replaced_and_listed(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    original = DaliPreparer.prepare

    def refuse(self: DaliPreparer, request: ClipRequest) -> Any:
        if request.source.path.endswith("2.webm"):
            raise DecodeError("refused")
        return original(self, request)

    cfg = config(max_broken=0.5, num_workers=num_workers)
    with monkeypatch.context() as patch:
        patch.setattr(DaliPreparer, "prepare", refuse)
        expected = collect(cfg, 4)
    monkeypatch.setattr(DaliPreparer, "prepare", spoiled({2}))
    with build_loader(cfg, num_steps=4) as loader:
        batches = list(loader)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.labels == other.labels and 2 not in batch.labels[0]
        assert torch.equal(batch.clips[0], other.clips[0])
    (broken,) = loader.broken()
    assert broken.path.endswith("2.webm") and broken.reason.startswith("DALI cannot decode it: ")


@needs_dali
def test_when_nothing_decodes_that_is_no_fault_of_the_files(
    config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DaliPreparer, "prepare", spoiled(set(range(8))))
    with pytest.raises(UserError, match="DALI decodes none of the 2 clips|DALI decodes none of the 4 clips"):
        collect(config(), 1)


@needs_dali
def test_other_codecs_are_left_to_pyav_with_one_warning(config: Callable[..., DataConfig], folder: Path) -> None:
    mixed = config(datasets=[str(folder / "others.csv"), str(folder / "list.csv")], datasets_weights=[1.0, 1.0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        batches = collect(mixed, 3)
    of_dali = [str(one.message) for one in said if "DALI" in str(one.message)]
    assert len(of_dali) == 1 and "h264 video on the CPU" in of_dali[0]
    labels = set()
    for batch, other in zip(batches, collect(mixed.model_copy(update={"backend": "pyav"}), 3), strict=True):
        assert batch.labels == other.labels
        for clip, reference, label in zip(batch.clips[0], other.clips[0], batch.labels[0], strict=True):
            labels.add(label >= 10)
            assert torch.equal(clip, reference) if label >= 10 else 0 < mean_difference(clip, reference) < 4
    assert labels == {False, True}


@needs_dali
@pytest.mark.parametrize("flip", [False, True])
def test_nothing_comes_into_an_enlarged_crop(flip: bool, folder: Path, tmp_path: Path) -> None:
    source, numbers = open_source(str(folder / "7.avi"), tmp_path), np.array([0, 2, 4, 8])
    (whole,) = run([ClipRequest(source, numbers, Box(0, 0, 48, 64), (48, 64), False)])
    (clip,) = run([ClipRequest(source, numbers, Box(11, 20, 9, 13), (32, 32), flip)])
    crop = whole[:, 11:20, 20:33].permute(0, 3, 1, 2).float()
    exact = F.interpolate(crop, size=(32, 32), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert float((clip.float() - (exact.flip(2) if flip else exact)).abs().max()) <= 0.501


@needs_dali
def test_images_and_videos_in_one_batch(config: Callable[..., DataConfig], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, file in enumerate(jpegs(3)):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(file)
    Image.new("RGB", (50, 40), (200, 10, 80)).save(tmp_path / "images" / "3.png")
    cfg = config(
        datasets=[str(tmp_path / "images"), str(folder / "list.csv")],
        datasets_weights=[1.0, 1.0],
        batch_size=8,
        aug=AugmentationConfig(horizontal_flip=True),
    )
    for batch, other in zip(collect(cfg, 2), collect(cfg.model_copy(update={"backend": "pyav"}), 2), strict=True):
        assert batch.labels == other.labels
        still = batch.clips[0].eq(batch.clips[0][:, :1]).all(dim=4).all(dim=3).all(dim=2).all(dim=1)
        assert 0 < int(still.sum()) < 8
        for clip, reference in zip(batch.clips[0], other.clips[0], strict=True):
            assert mean_difference(clip, reference) < 4


@needs_dali
def test_program_that_does_not_close_the_loader_ends(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from vjepa_fast.config.schema import DataConfig\n"
        "from vjepa_fast.data.loader import build_loader\n"
        f"cfg = DataConfig(datasets=[{str(folder / 'list.csv')!r}], batch_size=4, dataset_fpcs=[4], crop_size=32,"
        f" num_workers=1, cache_dir={str(tmp_path)!r}, backend='dali', device_prefetch=3)\n"
        "loader = build_loader(cfg)\nfor number, batch in enumerate(loader):\n    if number == 2: break\n"
        "print(batch.clips[0].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(vjepa_fast.__file__).parents[1])},
    )
    assert done.returncode == 0 and "[4, 4, 32, 32, 3]" in done.stdout, done.stderr


def test_absence_is_a_sentence(config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"data\.backend.*dali.*pip install 'vjepa-fast\[dali\]'"):
        build_loader(config())
    assert choose("auto", torch.device("cuda")) == choose("auto", CPU) == choose("pyav", CPU) == "pyav"


@pytest.mark.parametrize(
    ("on_gpu", "about", "expected"),
    [
        (False, ("vp9", "yuv420p", 64, 48), None),
        (False, ("h264", "yuv420p", 640, 360), "h264 video"),
        (False, ("mjpeg", "yuvj422p", 640, 360), "mjpeg video in yuvj422p"),
        (True, ("h264", "yuv420p", 640, 360), None),
        (True, ("hevc", "yuv420p10le", 640, 360), "hevc video in yuv420p10le"),
        (True, ("mjpeg", "yuvj420p", 640, 360), "mjpeg video"),
        (True, ("hevc", "yuv420p", 640, 120), "hevc video of less than 144 pixels"),
    ],
)
def test_what_is_not_given_to_dali(on_gpu: bool, about: tuple[str, str, int, int], expected: str | None) -> None:
    assert DaliPreparer(on_gpu)._refuse(*about) == expected


@needs_dali
@pytest.mark.gpu
def test_gpu_gives_the_frames_of_the_cpu(
    config: Callable[..., DataConfig], tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    why_not = dali.missing(torch.device("cuda"))
    if why_not is not None:
        pytest.skip(why_not)
    lines = []
    for number, options in enumerate([{"g": "12"}, {"g": "250", "bf": "2"}, {"codec": "libx265"}]):
        write_video(tmp_path / f"{number}.mp4", num_frames=60, height=160, width=256, **options)
        lines.append(f"{tmp_path}/{number}.mp4 {number}\n")
    (tmp_path / "list.csv").write_text("".join(lines))
    cfg = config(datasets=[str(tmp_path / "list.csv")], crop_size=64)
    with build_loader(cfg, device="cuda", num_steps=4) as loader:
        batches = list(loader)
    for batch, other in zip(batches, collect(cfg.model_copy(update={"backend": "pyav"}), 4), strict=True):
        assert batch.labels == other.labels and batch.clips[0].is_cuda
        for clip, reference in zip(batch.clips[0].cpu(), other.clips[0], strict=True):
            assert mean_difference(clip, reference) < 4
