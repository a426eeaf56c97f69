"""Zeroing the rows behind the last sequence: the context encoder's qkv in a buffer an eighth larger than its tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.zero_tail import zero_tail_


def test_zero_tail(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    masks = workload.masks(device)
    total, width = sum(masks.context_lengths), 3 * workload.width
    buffer = torch.zeros(total + total // 8, width, device=device, dtype=workload.torch_dtype)
    measure(lambda: zero_tail_(buffer, masks.cu_seqlens_context), num_bytes=buffer[total:].nbytes)
