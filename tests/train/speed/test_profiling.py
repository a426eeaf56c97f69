"""Which part of the step an operator of a profile belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vjepa_fast.bench.steps import OurStep, profile_steps
from vjepa_fast.bench.workload import TRIAL
from vjepa_fast.common import profiler_labels
from vjepa_fast.common.profiler_labels import PARTS, backward_of, kind_of
from vjepa_fast.train.speed.profiling import shares_table, times_by_part

CPU = torch.device("cpu")


@dataclass
class Event:
    name: str
    start: float
    end: float
    self_cpu_time_total: float = 1000.0
    self_device_time_total: float = 3000.0
    device_type: Any = torch.autograd.DeviceType.CPU
    time_range: Any = field(init=False)

    def __post_init__(self) -> None:
        self.time_range = SimpleNamespace(start=self.start, end=self.end)


def test_operators_go_to_the_innermost_label() -> None:
    events = [
        Event("aten::mm", 0, 1),
        Event("target encoder", 2, 10),
        Event("patch embedding", 3, 5),
        Event("aten::mm", 4, 5),
        Event("aten::mm", 6, 7),
        Event("backward", 10, 20),
        Event("aten::sum", 11, 12),
        Event("predictor, backward", 13, 13),
        Event("aten::mm", 14, 15),
        Event("aten::mm", 16, 17),
        Event("optimizer", 20, 30),
        Event("aten::add", 20, 21),
        Event("kernel", 4, 5, device_type=torch.autograd.DeviceType.CUDA),
    ]
    found = times_by_part(reversed(events), gpu=False)
    assert found == {
        "other": 1.0,
        "patch embedding": 1.0,
        "target encoder": 1.0,
        "loss, backward": 1.0,
        "predictor, backward": 2.0,
        "optimizer": 1.0,
    }
    assert times_by_part(events, gpu=True)["predictor, backward"] == 6.0
    lines = shares_table(found, 2).splitlines()
    assert lines[1].split() == ["patch", "embedding", "0.500", "14.3%"]
    assert lines[-1].split() == ["other", "0.500", "14.3%"]


def test_every_part_of_a_step_is_labelled() -> None:
    step = OurStep(TRIAL, CPU, 1)
    step(0)
    found = profile_steps(step, range(1), CPU)
    wanted = {*PARTS, *(backward_of(part) for part in PARTS if part not in ("target encoder", "optimizer"))}
    by_part = found["ms_by_part"]
    assert wanted <= set(by_part)
    assert sum(by_part.values()) == pytest.approx(sum(found["ms_by_kind"].values()), rel=0.01)
    # What little is left is the schedules and the loss's bookkeeping.
    assert by_part.get("other", 0.0) < 0.05 * sum(by_part.values())
    # Half a forward at least, even where another process took the core: a backward that was not found has no time.
    assert by_part["context encoder, backward"] > 0.5 * by_part["context encoder"]


def test_nothing_is_recorded_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler_labels, "record_function", None)
    OurStep(TRIAL, CPU, 1)(0)
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(TypeError):
        OurStep(TRIAL, CPU, 1)(0)


def test_kinds() -> None:
    assert [
        kind_of(name)
        for name in (
            "aten::mm",
            "aten::addmm",
            "aten::convolution",
            "vjepa_fast::patch_embed_bwd",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_cudnn_attention_forward",
            "aten::_flash_attention_backward",
            "vjepa_fast::attention_bwd",
            "vjepa_fast::layer_norm_fwd",
            "aten::add",
        )
    ] == ["matmul"] * 4 + ["attention"] * 4 + ["other"] * 2
