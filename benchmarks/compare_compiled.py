"""Our training step with and without compiled blocks (model.compile_model), step by step in turns.

    python -m benchmarks.compare_compiled [--workloads tiny small] [--device auto]

The first step of the compiled side is timed by itself, with an empty Inductor cache and with the cache that it leaves;
each in a process of its own. Results go to benchmarks/results/compiled_blocks_<device>_<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

import torch

from vjepa_fast.bench.steps import OurStep, interleave
from vjepa_fast.bench.timing import ROOT, Quantiles, environment, pick_device, synchronize
from vjepa_fast.bench.workload import BASE, LARGE, SMALL, TINY, TRIAL, Workload
from vjepa_fast.models.layers import set_compiled

_WORKLOADS = {"tiny": TINY, "small": SMALL, "base": BASE, "large": LARGE, "trial": TRIAL}
_NUM_BATCHES = 4


def first_step(workload: Workload, device: torch.device) -> float:
    """Seconds until the first compiled step is done."""
    step = OurStep(workload, device, 1)
    set_compiled(step.model, True)
    began = time.perf_counter()
    step(0)
    synchronize(device)
    return time.perf_counter() - began


def first_steps(name: str, device: torch.device) -> dict[str, float]:
    """The first step with an empty cache and with a filled one."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.compare_compiled",
        "--workloads",
        name,
        "--device",
        device.type,
        "--first-step",
    ]
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        seconds = [
            float(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.split()[-1])
            for _ in range(2)
        ]
    return dict(zip(("first_step_cold_s", "first_step_warm_s"), seconds, strict=True))


def compare(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """One workload; `ratio` is the median eager step over the median compiled one."""
    workload = _WORKLOADS[name]
    steps = {"eager": OurStep(workload, device, _NUM_BATCHES), "compiled": OurStep(workload, device, _NUM_BATCHES)}
    set_compiled(steps["compiled"].model, True)
    losses = {side: step(0).item() for side, step in steps.items()}
    interleave(dict(steps), device, _NUM_BATCHES)
    seconds = interleave(dict(steps), device, rounds, first_step=_NUM_BATCHES)
    times = {side: Quantiles.of(values) for side, values in seconds.items()}
    return {
        "losses_of_first_step": losses,
        "seconds": {side: asdict(q) for side, q in times.items()},
        "ratio": times["eager"].p50 / times["compiled"].p50,
        **first_steps(name, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=_WORKLOADS, default=["tiny", "small"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--first-step", action="store_true", help="only that, of one workload")
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.first_step:
        print(first_step(_WORKLOADS[options.workloads[0]], device))
        return
    record = {
        "environment": environment(device),
        "workloads": {name: compare(name, device, options.rounds) for name in options.workloads},
    }
    text = json.dumps(record, indent=1)
    path = ROOT / "benchmarks" / "results" / f"compiled_blocks_{device.type}_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
