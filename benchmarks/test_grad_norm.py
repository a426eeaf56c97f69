"""The norm of all gradients, which decides whether a step is skipped."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.grad_norm import sum_of_squares


def test_grad_norm(measure: Callable[..., None], workload: Workload, device: torch.device) -> None:
    model = workload.model(device)
    grads = [torch.randn_like(p) for p in model.parameters() if p.requires_grad]
    count = sum(g.numel() for g in grads)
    measure(lambda: sum_of_squares(grads), num_bytes=4 * count, flops=2 * count)
