"""A whole training step: forward, backward, AdamW, EMA. Masks are drawn beforehand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.steps import OurStep
from vjepa_fast.bench.workload import Workload
from vjepa_fast.cost.flops import step_flops


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphed"])
def test_step(measure: Callable[..., None], workload: Workload, device: torch.device, graphs: bool) -> None:
    """Model FLOPs over the time, beside the measured rate of matrix products."""
    if graphs and device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    step = OurStep(workload, device, num_batches=1, graphs=graphs)
    if graphs:
        step.warm_up()
    flops = step_flops(workload.config.model, step.masks[0]).total
    measure(lambda: step(0), flops=flops, clips=workload.batch_size, seconds=5.0, wall=True)
