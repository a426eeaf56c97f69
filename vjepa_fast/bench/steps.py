"""Times whole training steps, several implementations in turns, and profiles where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from vjepa_fast.bench.timing import synchronize
from vjepa_fast.bench.workload import Workload, fresh
from vjepa_fast.common.errors import UserError
from vjepa_fast.common.profiler_labels import kind_of
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.train.speed.graphs import WARM_UP, GraphedStep, refusal
from vjepa_fast.train.speed.profiling import LABELS, times_by_part
from vjepa_fast.train.step import TrainStep


class Step(Protocol):
    """One side of a comparison: call it with the number of the step."""

    def __call__(self, step: int) -> Any: ...


class OurStep:
    """vjepa_fast's step, over batches that take turns.

    Args:
        workload: what to train.
        device: where.
        num_batches: different batches, each with its own clips and masks.
        seed: of the weights.
        graphs: replay the step as CUDA graphs.

    Raises:
        UserError: `graphs` where none can serve.
    """

    def __init__(
        self, workload: Workload, device: torch.device, num_batches: int, *, seed: int = 0, graphs: bool = False
    ) -> None:
        self.workload = workload
        self.model = workload.model(device, seed)
        self.train_step = TrainStep(self.model, workload.config)
        self.clips = [workload.clips(device, index) for index in range(num_batches)]
        self.masks = [workload.masks(device, index) for index in range(num_batches)]
        self.run: TrainStep | GraphedStep = self.train_step
        if graphs:
            why = refusal(self.train_step)
            if why is not None:
                raise UserError(f"the step cannot be a CUDA graph: {why}")
            self.run = GraphedStep(self.train_step, [Sizes.of(masks) for masks in self.masks])

    def warm_up(self) -> None:
        """As many steps as it takes until all graphs are captured."""
        for number in range((WARM_UP + 1) * len(self.masks)):
            self(number)

    def __call__(self, step: int) -> torch.Tensor:
        """The loss, on the device."""
        # As a training run has it; a reference's step that took its turn may have switched it off.
        torch.backends.cuda.enable_cudnn_sdp(True)
        index = step % len(self.masks)
        return self.run(step, self.clips[index], fresh(self.masks[index])).loss


def check_same_loss(losses: dict[str, float], tolerance: float) -> None:
    """Refuse to time steps that do not compute the same thing.

    Args:
        losses: of the first step of each side, from the same weights on the same batch.
        tolerance: relative.

    Raises:
        ArithmeticError: two losses differ by more.
    """
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= tolerance * abs(high):
        raise ArithmeticError(
            f"the losses of the first step differ by more than {tolerance:g}: {losses}; no time is worth reporting"
        )


def interleave(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int,
    first_step: int = 0,
    budget_s: float = float("inf"),
    min_rounds: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turns: A B A B.

    Args:
        steps: the sides.
        device: synchronised around each step.
        rounds: steps of each side.
        first_step: number of the first one.
        budget_s: stop early after this time, but not before `min_rounds`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for number in range(first_step, first_step + rounds):
        for name, step in steps.items():
            synchronize(device)
            began = time.perf_counter()
            step(number)
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
        if time.perf_counter() - started > budget_s and number - first_step + 1 >= min_rounds:
            break
    return seconds


def masks_of_batches(masks: Sequence[MaskBatch]) -> dict[str, list[int]]:
    """Tokens of all sequences, batch by batch."""
    return {"context": [sum(m.context_lengths) for m in masks], "target": [sum(m.target_lengths) for m in masks]}


def kernels_of(step: Callable[[int], Any], num_steps: int, device: torch.device) -> list[dict[str, Any]]:
    """What runs on the device in a step, kernel by kernel, longest first: the only view of a replayed CUDA graph.

    Returns:
        name, milliseconds a step and calls a step of the 40 kernels with the most time; empty on a CPU.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for number in range(num_steps):
            step(number)
        synchronize(device)
    found = [event for event in recorded.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"name": event.key, "ms": event.self_device_time_total / 1e3 / num_steps, "calls": event.count / num_steps}
        for event in found[:40]
    ]


def profile_steps(step: Callable[[int], Any], numbers: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Where the time of some steps goes.

    Returns:
        Milliseconds a step by kind: `matmul` (with the patch embedding's convolution), `attention`, `other`; by part
        of the step (vjepa_fast.common.profiler_labels), where the step has labels; and the operators with the largest
        self time.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as recorded:
        for number in numbers:
            step(number)
        synchronize(device)
    kinds = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
    operators: list[tuple[float, str, int]] = []
    for event in recorded.key_averages():
        # Kernels are listed once more by themselves; what launched them already has their time.
        if event.device_type != torch.autograd.DeviceType.CPU or event.key in LABELS:
            continue
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        kinds[kind_of(event.key)] += micros / 1e3 / len(numbers)
        operators.append((micros / 1e3 / len(numbers), event.key, event.count // len(numbers)))
    operators.sort(reverse=True)
    by_part = times_by_part(recorded.events() or (), gpu)
    return {
        "ms_by_kind": kinds,
        "ms_by_part": {part: ms / len(numbers) for part, ms in by_part.items()},
        "operators": [{"name": name, "ms": ms, "calls": calls} for ms, name, calls in operators[:25]],
        "num_operators": sum(calls for _, name, calls in operators if name.startswith("aten::")),
    }
