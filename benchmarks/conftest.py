"""The `measure` fixture and what goes into the report.

    pytest benchmarks/                                  the size that fits the device
    pytest benchmarks/ --device cpu --size small        a given one
    pytest benchmarks/ --benchmark-json=out.json        with hardware, versions, command, date and commit
    pytest benchmarks/ --benchmark-disable              one call of each, no figures
    pytest benchmarks/ --benchmark-disable --size large --floors h200 --ignore benchmarks/test_step.py
                                                        no calls: bytes, FLOPs and the shortest time on a named GPU

A figure taken on a CPU speaks for that CPU only, and its operands may lie in the cache: a share of the memory limit
above 100 % is possible there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vjepa_fast.bench.timing import (
    Limits,
    Quantiles,
    cpu_times,
    cuda_times,
    environment,
    figures,
    limits_as_dict,
    measure_limits,
    pick_device,
    synchronize,
)
from vjepa_fast.bench.workload import LARGE, SMALL, TRIAL, Workload
from vjepa_fast.common import markdown

_SIZES = {"trial": TRIAL, "small": SMALL, "large": LARGE}
_GPUS = {"h200": Limits(4.8e12, 790e12, "bfloat16")}
"""Memory bandwidth of the data sheet, matrix products at what large ones reach."""
_COLUMNS = {
    "ms_p50": "ms",
    "ms_p20": "p20",
    "ms_p80": "p80",
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "percent_of_limit": "% of limit",
    "bound": "bound",
    "clips_per_s": "clips/s",
    "core_ms_per_clip": "core-ms/clip",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vjepa-fast benchmarks")
    group.addoption("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group.addoption("--size", default=None, choices=sorted(_SIZES), help="default: large on a GPU, small on a CPU")
    group.addoption("--floors", default=None, choices=sorted(_GPUS), help="print what bounds each operation, run none")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return pick_device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def workload(request: pytest.FixtureRequest, device: torch.device) -> Workload:
    """What all benchmarks are about."""
    name = request.config.getoption("--size") or ("large" if device.type == "cuda" else "small")
    return _SIZES[name]


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest, device: torch.device, workload: Workload) -> Limits:
    """Copy bandwidth and matrix product rate of this machine, measured once."""
    if request.config.getoption("--floors"):
        return _GPUS[request.config.getoption("--floors")]
    found = measure_limits(device, small=workload is TRIAL)
    request.config.stash[_LIMITS] = found
    return found


_LIMITS = pytest.StashKey[Limits]()
_FLOORS = pytest.StashKey[list[str]]()
Measure = Callable[..., None]


@pytest.fixture
def measure(
    benchmark: Any, device: torch.device, workload: Workload, limits: Limits, request: pytest.FixtureRequest
) -> Iterator[Measure]:
    """Times a function without arguments.

    measure(fn, num_bytes=..., flops=..., clips=..., seconds=..., wall=...): `num_bytes` counts each operand read once
    and each result written once, `flops` is the arithmetic of the formula in the operation's docstring, `clips` the
    clips that one call works on, `seconds` about how long to measure.

    On a GPU the quantiles are of CUDA events behind a busy stream with a cold cache, so launches do not count, unless
    `wall` is set; the table of pytest-benchmark holds wall times, in which they do. On a CPU all are wall times.
    """

    def run(
        fn: Callable[[], object],
        *,
        num_bytes: float = 0,
        flops: float = 0,
        clips: int = 0,
        seconds: float = 0.3,
        wall: bool = False,
    ) -> None:
        benchmark.extra_info.update(workload=workload.name, device=device.type)
        if request.config.getoption("--floors"):
            floor, bound = limits.floor(num_bytes, flops)
            name = request.node.name.removeprefix("test_")
            request.config.stash.setdefault(_FLOORS, []).append(
                [name, f"{num_bytes / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{1e6 * floor:.1f}", bound]
            )
            benchmark(lambda: None)
            return
        if benchmark.disabled:
            benchmark(fn)
            return

        def finished() -> None:
            fn()
            synchronize(device)

        timed = cuda_times(fn, seconds) if device.type == "cuda" and not wall else cpu_times(finished, seconds)
        found = figures(Quantiles.of(timed), limits, num_bytes, flops, clips)
        benchmark.extra_info.update(found)
        benchmark.pedantic(finished, rounds=5 if found["ms_p50"] < 500 else 1)

    yield run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["vjepa_fast"] = environment(pick_device(config.getoption("--device")))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    if _LIMITS in config.stash:
        output_json["limits"] = limits_as_dict(config.stash[_LIMITS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A table of times, rates and shares of the limits."""
    if config.getoption("--floors"):
        head = ["operation", "MB", "GFLOP", "floor, us", "bound"]
        for line in markdown.table(head, config.stash.get(_FLOORS, [])):
            terminalreporter.write_line(line)
    session = getattr(config, "_benchmarksession", None)
    if session is None or _LIMITS not in config.stash:
        return
    rows = [
        (bench.name.removeprefix("test_"), bench.extra_info)
        for bench in session.benchmarks
        if "ms_p50" in bench.extra_info
    ]
    if not rows:
        return
    found = config.stash[_LIMITS]
    about = environment(pick_device(config.getoption("--device")))
    terminalreporter.write_sep("-", f"{rows[0][1]['workload']} on {about['device']}")
    terminalreporter.write_line(
        f"measured limits: copy {found.bytes_per_s / 1e9:.1f} GB/s, {found.dtype} matmul "
        f"{found.flops_per_s / 1e12:.3f} TFLOP/s; load average {about['load_average']:.2f}"
    )
    width = max(len(name) for name, _ in rows) + 2
    terminalreporter.write_line("".ljust(width) + "".join(title.rjust(13) for title in _COLUMNS.values()))
    for name, info in rows:
        cells = [info.get(key, "") for key in _COLUMNS]
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        terminalreporter.write_line(name.ljust(width) + "".join(text.rjust(13) for text in texts))
