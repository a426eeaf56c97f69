"""Times steps and the share of them spent waiting for clips.

On a CPU by the clock. On a GPU the host hands out work far ahead of it, so neither its time in the loader nor its time
in the step says what the GPU did; three events on the stream that computes do:

    asked    recorded when the host asks for clips: passed when the work of the steps before is done
    arrived  recorded when the host has them: passed when they are decoded and copied too
    ended    recorded behind the work of the step

From `asked` to `arrived` the stream had nothing to do but wait for clips, whether a decoding process, the host or a
copy was late. A host that waits while the GPU is still at work on the step before costs nothing, and counts as nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class StepTimes:
    """Three moments of a step: seconds, or events on the stream that computes."""

    asked: Any
    arrived: Any
    ended: Any

    def seconds(self) -> tuple[float, float]:
        """Waiting for clips, and the step itself. On a GPU it waits for the step, unless that is over."""
        if isinstance(self.ended, float):
            return self.arrived - self.asked, self.ended - self.arrived
        self.ended.synchronize()
        return 1e-3 * self.asked.elapsed_time(self.arrived), 1e-3 * self.arrived.elapsed_time(self.ended)


class StepTimer:
    """Called in the order `ask`, `arrive`, `end` in every step; none of them waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._asked: Any = None
        self._arrived: Any = None

    def ask(self) -> None:
        """Before clips are asked for."""
        self._asked = self._now()

    def arrive(self) -> None:
        """When they are there, as far as the host is concerned."""
        self._arrived = self._now()

    def end(self) -> StepTimes:
        """Behind the step."""
        return StepTimes(self._asked, self._arrived, self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
