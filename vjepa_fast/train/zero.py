"""Optimizer state that is spread over the processes (ZeRO stage 1).

Every process has all weights and, from data parallelism, all gradients, but keeps the moments of its share of the
parameters only, 8 bytes a parameter over the number of processes. It updates its share and moves the target encoder
there; then each share is broadcast. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", SC 2020, stage P_os.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.train.optim import AdamWEMA

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class ShardedAdamWEMA(AdamWEMA):
    """AdamWEMA of which each process keeps a share. The update is that of AdamWEMA, but for the order of sums in the
    norm of the gradients.

    `state_dict` is a whole one after `collect`, on the first process; any process loads a whole one and keeps its
    share, so that checkpoints are the same with and without.

    Args:
        model: as AdamWEMA, the same on all processes; gradients are averaged by data parallelism.
        values: as AdamWEMA.
    """

    def __init__(self, model: VJEPA, **values: Any) -> None:
        super().__init__(model, **values)
        self._rank, size = dist.get_rank(), dist.get_world_size()
        self._all = [parameter for group in self.param_groups for parameter in group["params"]]
        self._owner: dict[Tensor, int] = {}
        loads = [0] * size
        # The largest first, each to whoever has least.
        for parameter in sorted(self._all, key=Tensor.numel, reverse=True):
            self._owner[parameter] = loads.index(min(loads))
            loads[self._owner[parameter]] += parameter.numel()
        self._collected: dict[int, dict[str, Tensor]] = {}

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process keeps the moments of a parameter and updates it."""
        return self._owner[parameter] == self._rank

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As AdamWEMA.step; a collective. Gradients of other shares are dropped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._all:
            if not self.owns(parameter):
                parameter.grad = None
        super().step()
        for rank in range(dist.get_world_size()):
            share = [parameter for parameter in self._all if self._owner[parameter] == rank]
            targets = [self._targets[parameter] for parameter in share if parameter in self._targets]
            _broadcast([*share, *targets], rank)
        return loss

    def collect(self) -> None:
        """Bring the moments of all shares to the memory of the first process's host; a collective."""
        for number, parameter in enumerate(self._all):
            if not parameter.requires_grad:
                continue
            state = self.state.get(parameter) if self.owns(parameter) else None
            # A parameter that never had a gradient has no moments.
            there = torch.tensor([int(bool(state))], device=parameter.device)
            dist.broadcast(there, self._owner[parameter])
            if not int(there):
                continue
            if state is None:
                state = {"step": torch.zeros((), device=parameter.device), "exp_avg": torch.empty_like(parameter),
                         "exp_avg_sq": torch.empty_like(parameter)}
            for name in _MOMENTS:
                dist.broadcast(state[name], self._owner[parameter])
            if self._rank == 0 and not self.owns(parameter):
                self._collected[number] = {name: state[name].cpu() for name in _MOMENTS}

    def state_dict(self) -> dict[str, Any]:
        """As AdamWEMA.state_dict; of the other shares what `collect` brought, which is handed over."""
        whole = super().state_dict()
        whole["state"] = dict(sorted({**whole["state"], **self._collected}.items()))
        self._collected = {}
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamWEMA.load_state_dict; the moments of other shares are dropped."""
        super().load_state_dict(state_dict)
        for parameter in self._all:
            if not self.owns(parameter):
                self.state.pop(parameter, None)

    def _sum_of_squares(self, gradients: Any, shards: Any) -> Tensor:
        total = super()._sum_of_squares(gradients, shards)
        dist.all_reduce(total)
        return total


def _broadcast(tensors: list[Tensor], rank: int) -> None:
    """In one message for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        dist.broadcast(flat, rank)
        if rank != dist.get_rank():
            parts = flat.split([tensor.numel() for tensor in some])
            torch._foreach_copy_(some, [part.view(tensor.shape) for part, tensor in zip(parts, some, strict=True)])
