"""Profiles a few steps (`--profile`) and attributes the time to the parts of the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vjepa_fast.common.atomic import disk_errors
from vjepa_fast.common.profiler_labels import BACKWARD, PARTS, backward_of

NUM_STEPS = 3


_MARKS = frozenset(backward_of(part) for part in PARTS)
LABELS = _MARKS | {*PARTS, BACKWARD}


def times_by_part(events: Iterable[Any], gpu: bool) -> dict[str, float]:
    """Milliseconds of the operators of each part of the steps in a profile.

    An operator belongs to the label (vjepa_fast.common.profiler_labels) that was at work when it began, `other` where
    none was. The backward may run in a thread of its own, but the step waits for it, so the time alone decides.

    Args:
        events: torch.profiler.profile.events().
        gpu: count what an operator's kernels took; else what the operator itself took on the CPU.
    """
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    boundaries: list[tuple[float, int, str]] = []
    for event in on_cpu:
        if event.name in _MARKS:
            boundaries.append((event.time_range.start, 1, event.name))
        elif event.name in LABELS:
            boundaries += [(event.time_range.start, 2, event.name), (event.time_range.end, 0, event.name)]
    starts, parts, stack = [float("-inf")], ["other"], ["other"]
    for time, what, name in sorted(boundaries):
        if what == 0:
            stack.pop()
        elif what == 1:
            stack[-1] = name
        else:
            stack.append(backward_of("loss") if name == BACKWARD else name)
        starts.append(time)
        parts.append(stack[-1])
    out: dict[str, float] = {}
    for event in on_cpu:
        if event.name not in LABELS:
            part = parts[bisect_right(starts, event.time_range.start) - 1]
            micros = event.self_device_time_total if gpu else event.self_cpu_time_total
            out[part] = out.get(part, 0.0) + micros / 1e3
    return out


def shares_table(milliseconds: dict[str, float], num_steps: int) -> str:
    """Milliseconds a step and share of each part, in the order of a step."""
    total = sum(milliseconds.values()) or 1.0
    names = [name for part in PARTS for name in (part, backward_of(part))] + ["other"]
    lines = [f"{'part of the step':30}{'ms a step':>12}{'share':>9}"]
    lines += [
        f"{name:30}{milliseconds[name] / num_steps:12.3f}{100 * milliseconds[name] / total:8.1f}%"
        for name in names
        if name in milliseconds
    ]
    return "\n".join(lines)


class StepProfiler:
    """Records NUM_STEPS steps and writes profile/trace.json and profile/operators.txt.

    The text has the share of each part of the step, then the operators that took longest.

    Args:
        folder: run folder.
        first: number of finished steps at which recording begins.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder = folder / "profile"
        self.first = first
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities, record_shapes=True)
        self.recording = False
        self.num_steps = 0

    def after_step(self, done: int) -> None:
        """Call after each step with the number of finished steps."""
        self.num_steps = done - self.first
        if done == self.first:
            self.profile.start()
            self.recording = True
        elif done == self.first + NUM_STEPS:
            self.close()

    def close(self) -> None:
        """End the recording, also before its time, and write what there is."""
        if not self.recording:
            return
        self.recording = False
        self.profile.stop()
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.profile.export_chrome_trace(str(self.folder / "trace.json"))
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            times = times_by_part(self.profile.events() or (), torch.cuda.is_available())
            (self.folder / "operators.txt").write_text(
                f"{shares_table(times, max(1, self.num_steps))}\n\n"
                + self.profile.key_averages().table(sort_by=order, row_limit=40)
            )
