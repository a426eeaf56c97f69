"""Everything that needs a GPU, part by part: is it right, and how fast is it.

    python -m benchmarks.gpu_run --parts environment tests            on a GPU: the tests, kernels compiled and run
    python -m benchmarks.gpu_run [--reference DIR] [--out DIR]        on a GPU: all other parts, up to 13 minutes
    python -m benchmarks.gpu_run --parts floors step few              some of them
    python -m benchmarks.gpu_run --cpu --small                        tries the call itself out on a CPU

Each part is a process of its own with a time limit, so that one that fails or hangs costs the others nothing. A short
table comes last; the whole result is in gpu_run.json in the output folder ($OUT, else ./out), beside the logs of all
parts in log.txt and the figures of single operations in benchmarks.json. DIR is a checkout of
facebookresearch/vjepa2. Exit code 0 means that every part finished. On an H200 with 16 cores a part takes 10 s to
start, and the first step of ViT-L with FlashAttention 4 takes 26 to 31 s, in which kernels are compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import importlib.util
import io
import json
import os
import pstats
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_run_table import as_table
from vjepa_fast.bench.compare import ON_GPU, beside_reference, measure_graphed, step_figures
from vjepa_fast.bench.steps import OurStep, interleave, kernels_of, profile_steps
from vjepa_fast.bench.timing import (
    ROOT,
    Limits,
    Quantiles,
    environment,
    limits_as_dict,
    measure_limits,
    pick_device,
    synchronize,
)
from vjepa_fast.bench.workload import FEW, LARGE, TRIAL, Workload
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.gpus import gpu_of_device, with_measured
from vjepa_fast.cost.prediction import predict

_NUM_BATCHES = 8
_COMPILED = "reference, and compiled"
_GRAPHED = "CUDA graphs"
OPTIONS: dict[str, dict[str, Any]] = {
    _GRAPHED: {},
    "float8 targets": {"target_precision": "float8"},
    "torch's varlen attention": {"attention": "varlen"},
    "compiled blocks": {"compile_model": True},
}
"""Of our step, each by itself: keys of `model`."""


@dataclass(frozen=True)
class Settings:
    """What a part gets to know."""

    device: torch.device
    small: bool
    out: Path

    @property
    def workload(self) -> Workload:
        return TRIAL if self.small else LARGE

    @property
    def few(self) -> Workload:
        return TRIAL if self.small else FEW

    @property
    def rounds(self) -> int:
        return 2 if self.small else 20

    @property
    def num_batches(self) -> int:
        return 2 if self.small else _NUM_BATCHES

    def keep(self, part: str, result: dict[str, Any]) -> None:
        """Of a part that may be cut off: what it has so far."""
        # Whole or not at all: the part may be killed at any moment.
        beside = self.out / f"{part}.json.part"
        beside.write_text(json.dumps(result))
        beside.replace(self.out / f"{part}.json")

    def limits(self) -> Limits:
        """Of the part `floors`; measured again if that failed."""
        with contextlib.suppress(OSError):
            return Limits(**json.loads((self.out / "floors.json").read_text())["limits"])
        return measure_limits(self.device, self.small)


def run_environment(settings: Settings) -> dict[str, Any]:
    """Hardware and versions."""
    return environment(settings.device)


def run_tests(settings: Settings) -> dict[str, Any]:
    """The tests that need a GPU, those of the kernels among them; several at a time where pytest-xdist is installed."""
    spread = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    code = subprocess.call([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *spread, "tests"], cwd=ROOT)
    # 5: nothing collected.
    if code not in (0, 5):
        raise RuntimeError(f"pytest ended with exit code {code}; see log.txt")
    return {"exit_code": code}


def run_floors(settings: Settings) -> dict[str, Any]:
    """Copy bandwidth and matrix product rate."""
    return {"limits": limits_as_dict(measure_limits(settings.device, settings.small))}


def run_operations(settings: Settings) -> dict[str, Any]:
    """Every operation by itself, and the loader."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "benchmarks",
        "--deselect",
        "benchmarks/test_step.py",
        "--device",
        settings.device.type,
        "--size",
        "trial" if settings.small else "large",
        f"--benchmark-json={settings.out / 'benchmarks.json'}",
    ]
    code = subprocess.call(command, cwd=ROOT)
    found = json.loads((settings.out / "benchmarks.json").read_text())
    out = {bench["name"].removeprefix("test_"): bench["extra_info"] for bench in found["benchmarks"]}
    if code != 0:
        raise RuntimeError(f"pytest ended with exit code {code} after {len(out)} benchmarks; see log.txt")
    return out


def run_step(settings: Settings) -> dict[str, Any]:
    """Our whole step: one at a time, and many without waiting in between, as training runs it."""
    return {"ours": _time_step(settings, settings.workload)}


def run_options(settings: Settings) -> dict[str, Any]:
    """Our step with other settings than the plain ones; one that fails has only `error`."""
    out: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        cfg = settings.workload.config.model_dump()
        cfg["model"] |= options
        workload = replace(settings.workload, given=Config.model_validate(cfg))
        try:
            out[name] = _time_step(settings, workload, graphs=name == _GRAPHED)
        except (RuntimeError, UserError) as error:
            out[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        settings.keep("options", out)
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return out


def _time_step(settings: Settings, workload: Workload, graphs: bool = False) -> dict[str, Any]:
    device = settings.device
    began = time.perf_counter()
    step = OurStep(workload, device, settings.num_batches, graphs=graphs)
    first = float(step(0))
    first_s = time.perf_counter() - began
    unseen = interleave({"ours": step}, device, settings.num_batches, budget_s=15)["ours"]
    if graphs:
        step.warm_up()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = interleave({"ours": step}, device, settings.rounds, budget_s=6)["ours"]
    began, count = time.perf_counter(), max(2, len(seconds) // 2)
    for number in range(count):
        step(number)
    synchronize(device)
    free = (time.perf_counter() - began) / count
    return step_figures(workload, step, seconds, settings.limits()) | {
        "first_step_s": first_s,
        "first_loss": first,
        "unseen_shapes": asdict(Quantiles.of(unseen)),
        "free_running_clips_per_s": workload.batch_size / free,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def run_graphed(settings: Settings) -> dict[str, Any]:
    """A step so small that launches dominate, eagerly and as CUDA graphs in turns."""
    step = OurStep(settings.few, settings.device, settings.num_batches)
    for number in range(settings.num_batches):
        step(number)
    return measure_graphed(step, settings.limits(), rounds=settings.rounds, budget_s=8)


def run_few(settings: Settings) -> dict[str, Any]:
    """The same small step, eagerly, beside the reference's without recomputing."""
    name = "reference, and no checkpointing"
    return _beside_reference(settings, {name: ON_GPU[name]}, warmup_s=6, budget_s=6, workload=settings.few)


def run_kernels(settings: Settings) -> dict[str, Any]:
    """Kernels by their time in a step, and the same of a replayed CUDA graph; where the host's time goes."""
    out = {}
    for name, workload in (("few", settings.few), ("large", settings.workload)):
        step = OurStep(workload, settings.device, 2)
        for number in range(4):
            step(number)
        host = cProfile.Profile()
        host.enable()
        for number in range(4):
            step(number)
        synchronize(settings.device)
        host.disable()
        told = io.StringIO()
        pstats.Stats(host, stream=told).sort_stats("tottime").print_stats(40)
        pstats.Stats(host, stream=told).sort_stats("cumtime").print_stats(60)
        out[name] = {"kernels": kernels_of(step, 2, settings.device), "host": told.getvalue()}
        with contextlib.suppress(UserError):
            graphed = OurStep(workload, settings.device, 2, graphs=True)
            graphed.warm_up()
            out[name]["kernels, graphed"] = kernels_of(graphed, 2, settings.device)
        settings.keep("kernels", out)
    return out


def _beside_reference(
    settings: Settings,
    variants: dict[str, dict[str, bool]],
    warmup_s: float,
    budget_s: float,
    workload: Workload | None = None,
) -> dict[str, Any]:
    root = Path(os.environ["VJEPA2_REFERENCE"])
    return beside_reference(
        workload or settings.workload,
        settings.device,
        root,
        variants,
        settings.limits(),
        num_batches=settings.num_batches,
        rounds=settings.rounds,
        warmup_s=warmup_s,
        budget_s=budget_s,
    )


def run_reference(settings: Settings) -> dict[str, Any]:
    """Beside the reference as configured, with its attention-plan stalls avoided, and without recomputing."""
    return _beside_reference(
        settings, {name: options for name, options in ON_GPU.items() if name != _COMPILED}, warmup_s=20, budget_s=12
    )


def run_reference_compiled(settings: Settings) -> dict[str, Any]:
    """Beside the reference at its best: compiled, no recomputing, no attention-plan stalls."""
    return _beside_reference(settings, {_COMPILED: ON_GPU[_COMPILED]}, warmup_s=60, budget_s=15)


def run_profile(settings: Settings) -> dict[str, Any]:
    """Where our step's time goes, beside what the cost model expects at the rates measured here."""
    step = OurStep(settings.workload, settings.device, 2)
    for number in range(4):
        step(number)
    found = profile_steps(step, range(2), settings.device)
    gpu = gpu_of_device(torch.cuda.get_device_name()) if settings.device.type == "cuda" else None
    if gpu is not None:
        gpu = with_measured(gpu, {"limits": limits_as_dict(settings.limits())})
        predicted = predict(settings.workload.config, gpu, [[masks] for masks in step.masks])
        found["predicted_ms_by_part"] = predicted.milliseconds()
    return found


@dataclass(frozen=True)
class Part:
    run: Callable[[Settings], dict[str, Any]]
    limit_s: int
    needs_reference: bool = False


PARTS = {
    "environment": Part(run_environment, 20),
    "floors": Part(run_floors, 25),
    "step": Part(run_step, 110),
    "profile": Part(run_profile, 35),
    "reference": Part(run_reference, 80, needs_reference=True),
    "graphed": Part(run_graphed, 40),
    "few": Part(run_few, 50, needs_reference=True),
    "kernels": Part(run_kernels, 70),
    "options": Part(run_options, 110),
    "operations": Part(run_operations, 130),
    "reference_compiled": Part(run_reference_compiled, 110, needs_reference=True),
    "tests": Part(run_tests, 400),
}
"""In the order of their worth: what is cut off at the end is missed least."""
TIMED = [name for name in PARTS if name != "tests"]
"""The tests, which compile some hundred kernels, would not leave them alone."""


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child and what it started; it leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_part(name: str, settings: Settings, log: Any) -> dict[str, Any]:
    """One part in its own process: {"seconds", "error" (None where it went well), "result"}."""
    result_file = settings.out / f"{name}.json"
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--part", name, "--out", str(settings.out)]
    command += ["--cpu"] * (settings.device.type == "cpu") + ["--small"] * settings.small
    began = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    error = None
    try:
        code = child.wait(PARTS[name].limit_s)
        error = None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {PARTS[name].limit_s} s"
    finally:
        _end(child)
    result = json.loads(result_file.read_text()) if result_file.exists() else None
    return {"seconds": time.monotonic() - began, "error": error, "result": result}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reference", type=Path, default=os.environ.get("VJEPA2_REFERENCE"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for trying out")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=TIMED)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("torch finds no GPU; use --cpu --small to try the call out")
    if arguments.reference:
        os.environ["VJEPA2_REFERENCE"] = str(Path(arguments.reference).resolve())
    settings = Settings(pick_device("cpu" if arguments.cpu else "cuda"), arguments.small, arguments.out.resolve())
    settings.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        settings.keep(arguments.part, PARTS[arguments.part].run(settings))
        return 0
    report: dict[str, Any] = {}
    with open(settings.out / "log.txt", "wb", buffering=0) as log:
        for name in PARTS:
            if name not in arguments.parts or (PARTS[name].needs_reference and not arguments.reference):
                continue
            print(f"{name} ...", flush=True)
            log.write(f"\n==== {name}\n".encode())
            report[name] = run_part(name, settings, log)
            (settings.out / "gpu_run.json").write_text(json.dumps(report, indent=1) + "\n")
    for name in report:
        (settings.out / f"{name}.json").unlink(missing_ok=True)
    missing: dict[str, Any] = {"seconds": 0.0, "error": "left out", "result": None}
    print(as_table({**{name: missing for name in PARTS if name not in report}, **report}))
    return 0 if all(part["error"] is None for part in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
