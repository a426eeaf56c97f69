"""Distance of predictions to targets, with the gradient of the predictions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.timing import randn
from benchmarks.workload import Workload
from vjepa_fast.ops.latent_loss import latent_loss


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_latent_loss(measure: Callable[..., None], workload: Workload, device: torch.device, mode: str) -> None:
    masks = workload.masks(device)
    count, width = len(masks.target_ids), workload.width
    predictions = randn(count, width, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
    targets = randn(count, width, device=device, dtype=torch.float32)
    weights = masks.token_weights()

    def forward_backward() -> None:
        predictions.grad = None
        latent_loss(predictions, targets, weights).backward()

    num_bytes = predictions.nbytes + targets.nbytes
    if mode == "forward":
        measure(lambda: latent_loss(predictions, targets, weights), num_bytes=num_bytes)
    else:
        measure(forward_backward, num_bytes=2 * num_bytes + predictions.nbytes)
