"""A step never waits for the device: shown on fake CUDA tensors, and on a GPU with torch's own watch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.speed.fake_cuda_step import CASES, batch_of
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.train.step import TrainStep

HERE = Path(__file__).parent


def preloaded(folder: Path) -> dict[str, str]:
    """The variables with which fake CUDA tensors have gradients; nothing is missing where torch was built for CUDA."""
    if torch.version.cuda is not None:
        return {}
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler, or a PyTorch that was built for CUDA")
    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{root / 'include'}",
            str(HERE / "fake_cuda.cpp"),
            "-o",
            str(library),
            f"-L{root / 'lib'}",
            f"-Wl,-rpath,{root / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
        ],
        check=True,
    )
    return {"LD_PRELOAD": str(library)}


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library, and needs Triton")
def test_a_step_on_fake_cuda_tensors_never_waits(tmp_path):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "fake_cuda_step.py")],
        env={**os.environ, **preloaded(tmp_path)},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.gpu
@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())
def test_a_step_on_a_gpu_never_waits(cfg):
    device = torch.device("cuda")
    model = VJEPA.from_config(cfg).to(device)
    train_step = TrainStep(model, cfg)
    batches = [batch_of(cfg, step) for step in (0, 1, 2) * 2]
    try:
        for step, (clips, masks) in enumerate(batches):
            clips, masks = [clip.to(device) for clip in clips], [mask.to(device) for mask in masks]
            # The first pass compiles kernels and measures what it chooses between, for each length that it meets.
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
            train_step(step, clips, masks)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
