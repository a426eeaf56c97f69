"""V-JEPA 1's variance term over the predictions of a batch, with their gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.variance_loss import variance_loss


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_variance_loss(measure: Callable[..., None], workload: Workload, device: torch.device, mode: str) -> None:
    masks = workload.masks(device)
    packing, weights = Packing(masks.target_lengths, masks.cu_seqlens_target), masks.clip_weights()
    predictions = randn(
        packing.total, workload.width, device=device, dtype=workload.torch_dtype, grad=mode != "forward"
    )

    def forward_backward() -> None:
        predictions.grad = None
        variance_loss(predictions, packing, weights).backward()

    if mode == "forward":
        with torch.no_grad():
            measure(
                lambda: variance_loss(predictions, packing, weights),
                num_bytes=predictions.nbytes,
                flops=6 * predictions.numel(),
            )
    else:
        measure(forward_backward, num_bytes=3 * predictions.nbytes, flops=8 * predictions.numel())
