"""The masks of one step: drawn, truncated, packed and put on the device. Work of the host, so wall time counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.bench.workload import Workload
from vjepa_fast.common import extension


@pytest.mark.parametrize("drawn_by", ["extension", "numpy"])
def test_mask_sample(
    measure: Callable[..., None],
    workload: Workload,
    device: torch.device,
    drawn_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if drawn_by == "numpy":
        monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    elif extension.load().path is None:
        pytest.skip(f"needs the compiled extension: {extension.load().reason}")
    sampler = vf.MaskSampler(workload.config.mask, workload.grid, workload.config.train.seed)
    ids = np.arange(workload.batch_size)
    measure(lambda: sampler(0, ids, device), clips=workload.batch_size, wall=True)
