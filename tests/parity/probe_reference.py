"""The reference's attentive probes and its optimizer settings, run at our sizes.

Of V-JEPA 2, `init_opt` of evals/video_classification_frozen/eval.py is called; of V-JEPA 1 too. Both checkouts are
imported at run time and nothing of them is copied.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.bench.reference import import_environment

from .probe_cases import NUM_STEPS, STEPS_PER_EPOCH, ProbeCase, ProbeRun

VARIABLES = {1: "VJEPA1_REFERENCE", 2: "VJEPA2_REFERENCE"}
SOURCES = ("evals/video_classification_frozen/eval.py", "src/models/attentive_pooler.py", "src/models/utils/modules.py")


def skip_without(case: ProbeCase) -> None:
    if not os.environ.get(VARIABLES[case.version]):
        pytest.skip(f"{VARIABLES[case.version]} does not name a checkout")


def root(version: int) -> Path:
    return Path(os.environ[VARIABLES[version]]).resolve()


@functools.cache
def modules(version: int) -> types.SimpleNamespace:
    """`poolers` and `evaluation` of a checkout."""
    state = torch.get_rng_state()
    # What reads and augments videos is not needed here, and wants libraries that need not be there.
    readers = ("evals.video_classification_frozen.utils", "src.datasets.data_manager")
    with import_environment(root(version)):
        poolers = importlib.import_module("src.models.attentive_pooler")
        with mock.patch.dict("sys.modules", {name: mock.MagicMock() for name in readers}):
            evaluation = importlib.import_module("evals.video_classification_frozen.eval")
    torch.set_rng_state(state)
    return types.SimpleNamespace(poolers=poolers, evaluation=evaluation)


def build(case: ProbeCase, dtype: torch.dtype) -> nn.Module:
    """An untrained probe."""
    probe: nn.Module = modules(case.version).poolers.AttentiveClassifier(
        embed_dim=case.dim, num_heads=case.num_heads, depth=case.depth, num_classes=case.num_classes
    )
    return probe.to(dtype)


def run(case: ProbeCase, weights: dict[str, Tensor], dtype: torch.dtype) -> ProbeRun:
    """Three steps from some weights."""
    probe, evaluation, given = build(case, dtype), modules(case.version).evaluation, case.optimization
    missing, unexpected = probe.load_state_dict(weights, strict=False)
    assert not unexpected and all("xattn.proj" in name for name in missing)
    if case.version == 2:
        (optimizer,), _, (schedule,), (decay_schedule,) = evaluation.init_opt(
            [probe],
            STEPS_PER_EPOCH,
            [
                {
                    "ref_wd": given["weight_decay"],
                    "final_wd": given["final_weight_decay"],
                    "start_lr": given["start_lr"],
                    "ref_lr": given["lr"],
                    "final_lr": given["final_lr"],
                    "warmup": given["warmup"],
                }
            ],
            given["num_epochs"],
        )
    else:
        optimizer, _, schedule, decay_schedule = evaluation.init_opt(
            probe,
            STEPS_PER_EPOCH,
            given["start_lr"],
            given["lr"],
            given["warmup"],
            given["num_epochs"],
            given["weight_decay"],
            final_lr=given["final_lr"],
        )
    steps = []
    for number in range(NUM_STEPS):
        schedule.step()
        decay_schedule.step()
        outputs = probe(case.features(number).to(dtype))
        loss = F.cross_entropy(outputs, case.labels(number))
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in probe.named_parameters() if value.grad is not None}
        if case.version == 1:
            torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        group = optimizer.param_groups[0]
        steps.append((loss.item(), outputs.detach(), gradients, group["lr"], group["weight_decay"]))
        optimizer.step()
        optimizer.zero_grad()
    assert all(math.isfinite(step[0]) for step in steps)
    return ProbeRun(
        steps, {name: value.detach() for name, value in probe.state_dict().items() if "xattn.proj" not in name}
    )
