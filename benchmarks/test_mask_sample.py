"""The masks of one step: drawn, truncated, packed and put on the device. Work of the host, so wall time counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import vjepa_fast as vf
from benchmarks.workload import Workload


def test_mask_sample(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    sampler = vf.MaskSampler(workload.config.mask, workload.grid, workload.config.train.seed)
    ids = np.arange(workload.batch_size)
    measure(lambda: sampler(0, ids, device), clips=workload.batch_size, wall=True)
