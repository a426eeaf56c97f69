"""What a step waits for: on a CPU the host's wait, on a GPU the stream's, whatever the host did meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vjepa_fast.train.monitor.progress import Speed
from vjepa_fast.train.speed.step_timer import StepTimer


class Timeline:
    """A host, and a stream that works through what the host hands it; milliseconds."""

    def __init__(self) -> None:
        self.host = 0.0
        self.stream = 0.0
        self.num_waits = 0

    def compute(self, ms: float) -> None:
        self.stream = max(self.stream, self.host) + ms

    def wait_for(self, moment: float) -> None:
        self.stream = max(self.stream, self.host, moment)


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    line = Timeline()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = line.stream = max(line.stream, line.host)

        def synchronize(self) -> None:
            line.num_waits += line.host < self.at
            line.host = max(line.host, self.at)

        def elapsed_time(self, end: Event) -> float:
            assert line.host >= end.at, "read before it was reached"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return line


# Where the host is when the clips are there for it, when they are copied, and what the stream then has waited: it is
# at work until 50.
CASES = {
    "in time": (1.0, 1.0, 0.0),
    "host waits behind a busy stream": (40.0, 45.0, 0.0),
    "copy is late": (1.0, 70.0, 20.0),
    "decoding process is late": (80.0, 80.0, 30.0),
    "both": (80.0, 95.0, 45.0),
}


@pytest.mark.parametrize(("host", "copied", "expected"), CASES.values(), ids=CASES.keys())
def test_gpu_waits_for_what_the_stream_waits_for(
    timeline: Timeline, host: float, copied: float, expected: float
) -> None:
    timer = StepTimer(torch.device("cuda"))
    timeline.compute(50)
    timer.ask()
    timeline.host = host
    timeline.wait_for(copied)
    timer.arrive()
    timeline.compute(100)
    times = timer.end()
    # A later step is under way before anything is read.
    timer.ask()
    assert timeline.num_waits == 0 and timeline.host == host
    timeline.host = 1000
    wait, step = times.seconds()
    assert (wait, step) == pytest.approx((expected / 1e3, 0.1)) and timeline.num_waits == 0


def test_host_that_is_slow_itself_is_no_wait_for_clips(timeline: Timeline) -> None:
    timer = StepTimer(torch.device("cuda"))
    timeline.compute(5)
    timeline.host = 60
    timer.ask()
    timeline.host = 62
    timer.arrive()
    timeline.compute(1)
    times = timer.end()
    timeline.host = 100
    assert times.seconds() == pytest.approx((0.002, 0.001))


def test_cpu_waits_as_long_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    moments: Iterator[Any] = iter([10.0, 10.25, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    timer = StepTimer(torch.device("cpu"))
    timer.ask()
    timer.arrive()
    assert timer.end().seconds() == (0.25, 0.75)


def test_share_leaves_out_the_first_steps() -> None:
    speed = Speed()
    for _ in range(3):
        speed.add(4, 10.0, 9.0)
    assert speed.data_wait == pytest.approx(0.9)
    for _ in range(4):
        speed.add(4, 1.0, 0.25)
    assert speed.data_wait == pytest.approx(0.25) and speed.clips_per_s == pytest.approx(4.0)


@pytest.mark.gpu
def test_events_see_what_the_stream_waits_for() -> None:
    device = torch.device("cuda")
    side = torch.cuda.Stream()

    def measure(busy_ms: int, host_s: float, copy_ms: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        timer = StepTimer(device)
        torch.cuda._sleep(busy_ms * cycles_per_ms)
        timer.ask()
        time.sleep(host_s)
        with torch.cuda.stream(side):
            torch.cuda._sleep(copy_ms * cycles_per_ms)
            done = side.record_event()
        torch.cuda.current_stream().wait_event(done)
        timer.arrive()
        torch.cuda._sleep(20 * cycles_per_ms)
        return timer.end().seconds()

    cycles_per_ms = 1_000_000
    measure(1, 0.0, 1)
    # How long a cycle is differs between GPUs and with their clock.
    cycles_per_ms = int(cycles_per_ms * 0.02 / measure(1, 0.0, 1)[1])
    assert measure(200, 0.05, 1)[0] < 0.01
    assert 0.08 < measure(50, 0.15, 1)[0] < 0.13
    assert 0.08 < measure(50, 0.0, 150)[0] < 0.13
