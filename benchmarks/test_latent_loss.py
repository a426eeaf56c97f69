"""Gather, both norms of the target and the distance, with the gradient of the predictions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
from vjepa_fast.ops.latent_loss import latent_loss


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_latent_loss(
    measure: Callable[..., None], workload: Workload, device: torch.device, mode: str, levels: int
) -> None:
    masks = workload.masks(device)
    count, width = len(masks.target_ids), levels * workload.width
    predictions = randn(count, width, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
    num_features = masks.batch_size * masks.num_tokens
    features = randn(num_features, width, device=device, dtype=workload.torch_dtype)
    weights, rows = masks.token_weights(), masks.target_rows
    norm = torch.ones(width, device=device), torch.zeros(width, device=device), 1e-6

    def forward_backward() -> None:
        predictions.grad = None
        latent_loss(predictions, features, weights, 1.0, rows, norm, levels).backward()

    # A slope takes a byte, written in the forward and read in the backward.
    num_bytes = 2 * predictions.nbytes + predictions.numel()
    if mode == "forward":
        measure(
            lambda: latent_loss(predictions, features, weights, 1.0, rows, norm, levels),
            num_bytes=num_bytes,
            flops=16 * predictions.numel(),
        )
    else:
        measure(
            forward_backward,
            num_bytes=num_bytes + predictions.numel() + predictions.nbytes,
            flops=17 * predictions.numel(),
        )
