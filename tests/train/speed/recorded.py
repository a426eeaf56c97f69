"""A CUDA graph without CUDA: operators are recorded with their operands and run again on the same memory.

As with a graph, Python runs once: whatever it took from a number, a list or an array is the same in every replay, and
only what lies in tensors that somebody writes to between replays can differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vjepa_fast.ops.adamw_ema import Operands
from vjepa_fast.train.speed.graphs import GraphedStep


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # Views, and results of operators in place, are where they belong when the operator runs again.
        known = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        places = [None if x.untyped_storage().data_ptr() in known else x for x in tensors(out)]
        self.calls.append((func, args, kwargs, places))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, places in self.calls:
                out = func(*args, **kwargs)
                if any(place is not None for place in places):
                    for place, new in zip(places, [out] if isinstance(out, Tensor) else tensors(out), strict=True):
                        if place is not None:
                            place.copy_(new)


class RecordedStep(GraphedStep):
    """With recordings in place of graphs; a recording computes, so it stands for the first replay as well."""

    def _aside(self, run: Callable[[], None]) -> None:
        run()

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        with recording:
            run()
        replays = iter([lambda: None])
        return lambda: next(replays, recording.replay)()


@torch.no_grad()
def adamw_ema_by_device_(operands: Operands, group_values: Tensor, sum_of_squares: Tensor) -> None:
    """adamw_ema_ of operators that read all values from the device, as its kernels do."""
    o, updates = operands, torch.isfinite(sum_of_squares)
    for index, param in enumerate(o.params):
        lr, beta1, beta2, eps, weight_decay, momentum = group_values[o.groups[index]].unbind()
        grad, target = o.grads[index], o.targets[index]
        if grad is not None:
            step, mean, square = o.steps[index], o.exp_avgs[index], o.exp_avg_sqs[index]
            assert step is not None and mean is not None and square is not None
            new_step, new_mean = step + 1, mean + (1 - beta1) * (grad - mean)
            new_square = square + (1 - beta2) * (grad.square() - square)
            denominator = new_square.sqrt() / (1 - beta2**new_step).sqrt() + eps
            new = param * (1 - lr * weight_decay) - lr / (1 - beta1**new_step) * new_mean / denominator
            for x, value in ((step, new_step), (mean, new_mean), (square, new_square), (param, new)):
                x.copy_(torch.where(updates, value, x))
        if target is not None:
            target.copy_(target * momentum + param * (1 - momentum))
        for copy, original in ((o.shadows[index], param), (o.target_shadows[index], target)):
            if copy is not None:
                copy.copy_(original)
