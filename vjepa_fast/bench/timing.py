"""Timing on CPU and GPU, the machine's limits, and a record of the environment of a measurement.

A share of a limit is always a share of a measured one: `measure_limits` times a large copy and a large matrix product
on random data, and `share_of_limit` divides the time that the slower of the two would need by the time taken.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vjepa_fast
from vjepa_fast.common.hardware import cpu_name

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, unless the package is installed."""
QUANTILES = (0.2, 0.5, 0.8)
_L2_BYTES = 256 << 20
_SLEEP_CYCLES = 1_000_000


@dataclass(frozen=True)
class Quantiles:
    """Quantiles 20, 50 and 80 of a set of times, seconds."""

    p20: float
    p50: float
    p80: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> Quantiles:
        low, middle, high = (
            torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        )
        return cls(low, middle, high, len(seconds))


@dataclass(frozen=True)
class Limits:
    """What this machine reaches, measured. Bytes count reads and writes."""

    bytes_per_s: float
    flops_per_s: float
    dtype: str
    """Dtype of the matrix product."""

    def floor(self, num_bytes: float = 0, flops: float = 0) -> tuple[float, str]:
        """Shortest time for this work, seconds, and what bounds it: `memory` or `compute`."""
        memory, compute = num_bytes / self.bytes_per_s, flops / self.flops_per_s
        return max(memory, compute), "memory" if memory >= compute else "compute"


def pick_device(name: str = "auto") -> torch.device:
    """`auto`, `cpu` or `cuda`."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_times(
    fn: Callable[[], object], budget_s: float = 0.3, min_rounds: int = 5, max_rounds: int = 100
) -> list[float]:
    """Seconds of single calls, after two that are not counted."""
    fn()
    began = time.perf_counter()
    fn()
    once = time.perf_counter() - began
    times = []
    for _ in range(max(min_rounds, min(max_rounds, int(budget_s / max(once, 1e-7))))):
        began = time.perf_counter()
        fn()
        times.append(time.perf_counter() - began)
    return times


def cuda_times(
    fn: Callable[[], object], budget_s: float = 0.3, min_rounds: int = 20, max_rounds: int = 200
) -> list[float]:
    """Seconds that the GPU needs for single calls.

    Before each call the second-level cache is overwritten and the stream is kept busy for about half a millisecond,
    so that a short kernel is timed from memory and not from when the CPU got round to launching it.
    """
    scratch = torch.empty(_L2_BYTES // 4, device="cuda")
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    began = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    once = time.perf_counter() - began
    rounds = max(min_rounds, min(max_rounds, int(budget_s / max(once, 1e-5))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        scratch.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def times(fn: Callable[[], object], device: torch.device, budget_s: float = 0.3) -> list[float]:
    """Seconds of single calls on a device."""
    return cuda_times(fn, budget_s) if device.type == "cuda" else cpu_times(fn, budget_s)


def measure_limits(device: torch.device, small: bool = False) -> Limits:
    """Copy bandwidth and matrix product rate.

    Args:
        device: bf16 products on a GPU, fp32 on a CPU.
        small: a copy and a product that take milliseconds, for trying the benchmarks out.
    """
    gpu = device.type == "cuda"
    num_floats = (1 << 20) if small else (1 << 30) if gpu else (64 << 20)
    side = 256 if small else 8192 if gpu else 2048
    dtype = torch.bfloat16 if gpu else torch.float32
    source = torch.rand(num_floats, device=device)
    target = torch.empty_like(source)
    copying = Quantiles.of(times(lambda: target.copy_(source), device)).p50
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    product = Quantiles.of(times(lambda: torch.mm(a, b, out=c), device)).p50
    return Limits(2 * source.nbytes / copying, 2 * side**3 / product, str(dtype).removeprefix("torch."))


def figures(
    quantiles: Quantiles, limits: Limits, num_bytes: float = 0, flops: float = 0, clips: int = 0
) -> dict[str, Any]:
    """Times in ms and the rates that follow from them."""
    out: dict[str, Any] = {
        "ms_p20": quantiles.p20 * 1e3,
        "ms_p50": quantiles.p50 * 1e3,
        "ms_p80": quantiles.p80 * 1e3,
        "rounds": quantiles.count,
    }
    if num_bytes:
        out |= {"bytes": num_bytes, "gb_per_s": num_bytes / quantiles.p50 / 1e9}
    if flops:
        out |= {"flops": flops, "tflop_per_s": flops / quantiles.p50 / 1e12}
    if num_bytes or flops:
        floor, bound = limits.floor(num_bytes, flops)
        out |= {"percent_of_limit": 100 * floor / quantiles.p50, "bound": bound}
    if clips:
        out |= {"clips_per_s": clips / quantiles.p50}
    return out


def _output_of(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, command, date and commit of a measurement."""
    # Installed, the package may lie inside a repository that it does not belong to.
    own = (ROOT / "pyproject.toml").is_file()
    status = _output_of("git", "status", "--porcelain", "--untracked-files=no") if own else None
    out: dict[str, Any] = {
        "device": f"CPU: {cpu_name()}, {torch.get_num_threads()} threads",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vjepa_fast": vjepa_fast.__version__,
        "command": " ".join(["python", *(argument.removeprefix(f"{ROOT}/") for argument in sys.orig_argv[1:])]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _output_of("git", "rev-parse", "HEAD") if own else None,
        "uncommitted_changes": None if status is None else bool(status),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        fields = "driver_version,power.limit,clocks.max.sm,clocks.current.sm,memory.total"
        out |= {
            "device": gpu.name,
            "memory_gib": gpu.total_memory / 2**30,
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": {
                "fields": fields,
                "values": _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"),
            },
            "libnvcuvid": _loads("libnvcuvid.so.1"),
        }
    return out


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def limits_as_dict(limits: Limits) -> dict[str, Any]:
    """For a JSON file."""
    return asdict(limits)


def randn(*shape: int, device: torch.device, dtype: torch.dtype, grad: bool = False) -> Tensor:
    """Random normal numbers; zeros would flatter the arithmetic of some machines."""
    return torch.randn(*shape, device=device).to(dtype).requires_grad_(grad)
