"""Planes of decoded frames to a clip: the operator, its definition in PyTorch, and what it stands in for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from vjepa_fast.bench.workload import Workload
from vjepa_fast.common import extension
from vjepa_fast.ops.clip_pixels import clip_pixels

# 360p, and a crop of average size.
_HEIGHT, _WIDTH, _BOX = 360, 640, (30, 100, 290, 340)


@pytest.mark.parametrize("made_by", ["extension", "torch", "interpolate"])
def test_clip_pixels(
    measure: Callable[..., None],
    workload: Workload,
    device: torch.device,
    made_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`interpolate` resizes RGB in fp32, as the reference does; decoding to RGB is not counted."""
    if made_by == "torch":
        monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    elif extension.load().path is None:
        pytest.skip(f"needs the compiled extension: {extension.load().reason}")
    side, num_frames = workload.config.data.crop_size[0], workload.num_frames
    generator = torch.Generator().manual_seed(0)
    y, u, v = (
        torch.randint(0, 256, (num_frames, _HEIGHT // n, _WIDTH // n), generator=generator).byte().to(device)
        for n in (1, 2, 2)
    )
    num_bytes = num_frames * (3 * side * side + _BOX[2] * _BOX[3] * 3 // 2)
    if made_by == "interpolate":
        top, left, height, width = _BOX
        rgb = torch.stack([y, y, y], dim=1)

        def run() -> object:
            cut = rgb[:, :, top : top + height, left : left + width].float()
            return F.interpolate(cut, size=(side, side), mode="bilinear", align_corners=False)

        measure(run, num_bytes=num_bytes, clips=1)
        return
    measure(lambda: clip_pixels(y, u, v, _BOX, (side, side), flip=True), num_bytes=num_bytes, clips=1)
