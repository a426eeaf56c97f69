"""Times trial steps on this machine and these shapes, and undoes them.

`auto` must not change what a run learns: whatever a step writes to is put back as it was, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor

from vjepa_fast.optim.dtensors import local_of
from vjepa_fast.train.step import TrainStep

MARGIN = 1.03
"""How much faster something must be to be chosen, or noise would decide."""


def _copy(x: Tensor) -> Tensor:
    """In the host's memory, of which there is more."""
    return x.detach().to("cpu", copy=True)


@contextmanager
def restoring_state(train_step: TrainStep) -> Iterator[None]:
    """Steps within leave no trace in the model, the optimizer, the loss scale and torch's generators.

    Gradients must be absent, as they are between steps.
    """
    model, optimizer, scaler = train_step.model, train_step.optimizer, train_step.scaler
    device = next(model.parameters()).device
    optimizer.refresh()
    weights = [*map(local_of, model.parameters()), *model.buffers()]
    if train_step.outliers is not None:
        weights += train_step.outliers.state_dict().values()
    saved = [_copy(x) for x in weights]
    states = {p: {name: _copy(local_of(x)) for name, x in state.items()} for p, state in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    figures = optimizer.grad_norm, optimizer.skipped
    scale = {} if scaler is None else scaler.state_dict()
    generators = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        optimizer.refresh()
        with torch.no_grad():
            # In place, so that nobody who knows an address is misled; the version counters tell that copies of
            # parameters in half precision are out of date.
            for x, before in zip(weights, saved, strict=True):
                x.copy_(before)
            for p in list(optimizer.state):
                if p not in states:
                    del optimizer.state[p]
                    continue
                for name, before in states[p].items():
                    local_of(optimizer.state[p][name]).copy_(before)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        optimizer.grad_norm, optimizer.skipped = figures
        if scaler is not None:
            scaler.load_state_dict(scale)
        torch.set_rng_state(generators[0])
        if generators[1] is not None:
            torch.cuda.set_rng_state(generators[1], device)


def race(sides: Mapping[str, Callable[[int], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each side, taken in turns.

    Args:
        sides: called with the number of the round.
        device: waited for around each step.
        rounds: steps of each side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            seconds[name].append(seconds_of(partial(run, number), device))
    return {name: median(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, with the device waited for before and after it."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
