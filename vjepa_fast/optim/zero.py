"""AdamWEMA with its work split over the processes (ZeRO-1).

Each process averages the gradients of its share of the parameters, as the backward produces them, keeps the moments of
this share, updates it and moves the target encoder there; then the shares are brought together while the next step
begins. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020: stage P_os
in what is kept from step to step; whole gradients are there only while their bucket is on its way, as with P_g.

Bytes a parameter and process, of n: 4 for weights, 4 for targets, 8 / n for moments, 4 / n for gradients; in half
precision 2 more for each of weights and targets. The masters of other shares are not freed, they are out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.optim.dtensors import keep_part
from vjepa_fast.optim.flat_buffers import make_buckets
from vjepa_fast.optim.zero_comm import Gradients, Weights, all_gather

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamWEMA(AdamWEMA):
    """AdamWEMA that also averages the gradients over the processes, of which each updates a share.

    The model needs no wrapper. The update is that of AdamWEMA, but for the order of sums in the norm of the gradients.

    `state_dict` is a whole one after `collect`, on the first process; any process loads a whole one and keeps its
    share, so that checkpoints are the same with and without, at any number of processes.

    Args:
        model: as AdamWEMA; all processes begin with the weights of the first one.
        values: as AdamWEMA.
        without_gradient: names of trained parameters that no step uses.
        optional: names of parameters that some steps do not use.
        grad_dtype: in which gradients travel and are added up.
    """

    def __init__(
        self,
        model: VJEPA,
        *,
        without_gradient: Collection[str] = (),
        optional: Collection[str] = (),
        grad_dtype: torch.dtype = torch.float32,
        **values: Any,
    ) -> None:
        # First, so that all else sees the weights where they stay.
        self._rank = dist.get_rank()
        self._buckets = make_buckets(model, without_gradient, self._rank, dist.get_world_size())
        for bucket in self._buckets:
            for flat in bucket.flats:
                dist.broadcast(flat.data, 0)
        super().__init__(model, **values)
        self._all = [parameter for group in self.param_groups for parameter in group["params"]]
        self._bucketed = {parameter for bucket in self._buckets for parameter in bucket.parameters}
        self._parts = {parameter: part for bucket in self._buckets for parameter, part in bucket.parts.items()}
        for bucket in self._buckets:
            for flat in bucket.flats:
                for parameter, tensor in zip(bucket.parameters, flat.tensors, strict=True):
                    keep_part(tensor, bucket.parts.get(parameter, slice(0, 0)))
        self._keep_halves()
        self._weights = Weights(model, self._buckets)
        chosen = [parameter for name, parameter in model.named_parameters() if name in optional]
        self._gradients = Gradients(self._buckets, grad_dtype, chosen)
        self._present: set[Tensor] = set()
        self._grads: dict[Tensor, Tensor] = {}
        self._collected: dict[int, dict[str, Tensor]] | None = None

    def _keep_halves(self) -> None:
        """Half-precision copies in flat buffers, of the layers within blocks."""
        self._shadowed = set()
        if self._dtype == torch.float32:
            return
        for bucket in self._buckets:
            for flat in bucket.flats if bucket.blocks else ():
                # In float8 a target's layers multiply with what they make of the masters.
                if flat is bucket.weights or self.model.cfg.target_precision != "float8":
                    self._shadows |= flat.keep_half(self._dtype)
        self._shadowed |= self._shadows.keys()

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process updates a part of a parameter; what has no gradient is kept by all."""
        return parameter in self._parts or parameter not in self._bucketed

    def no_sync(self) -> AbstractContextManager[None]:
        """For backwards whose gradients are added to those of the next."""
        return self._gradients.paused()

    def flush(self) -> None:
        """As AdamWEMA.flush."""
        self._gradients.flush()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As AdamWEMA.step; a collective.

        Raises:
            RuntimeError: a parameter has no gradient on any process, and is not one of those that may have none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Of a network that the step did not run.
        self._weights.wait()
        shares, self._present = self._gradients.finish()
        for bucket, share in zip(self._buckets, shares, strict=True):
            self._grads |= bucket.own(share)
        super().step()
        self._grads = {}
        self._collected = None
        self._weights.start()
        return loss

    def refresh(self) -> None:
        """Bring the fp32 weights of all shares up to date on all processes; a collective.

        A step in half precision leaves those of other shares as they were. Who reads them gets a RuntimeError until
        then, or until something else is loaded into them.
        """
        self._weights.refresh()

    def collect(self) -> None:
        """`refresh`, and bring the moments of all shares to the memory of the first process's host; a collective."""
        self.refresh()
        device = self._buckets[0].weights.data.device
        steps = torch.full((len(self._all),), -1.0, device=device)
        for number, parameter in enumerate(self._all):
            if self.state.get(parameter):
                steps[number] = self.state[parameter]["step"]
        # A parameter that never had a gradient has no moments.
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        counts = dict(zip(self._all, steps.cpu(), strict=True))
        collected: dict[Tensor, dict[str, Tensor]] = {p: {"step": n} for p, n in counts.items() if n >= 0}
        for bucket in self._buckets:
            for name in _MOMENTS:
                whole = torch.zeros_like(bucket.weights.data)
                for parameter, place in bucket.own(whole[bucket.share]).items():
                    if self.state.get(parameter):
                        place.copy_(self.state[parameter][name])
                all_gather(whole, whole[bucket.share])
                if self._rank == 0:
                    for parameter, view in zip(bucket.parameters, bucket.weights.views(whole), strict=True):
                        if parameter in collected:
                            collected[parameter][name] = view.to("cpu", copy=True)
        self._collected = {n: collected[p] for n, p in enumerate(self._all) if p in collected and self._rank == 0}

    def state_dict(self) -> dict[str, Any]:
        """As AdamWEMA.state_dict, after `collect`, which has to be called for each; without moments, but on the first
        process.

        Raises:
            RuntimeError: it was not called.
        """
        if self._collected is None:
            raise RuntimeError(
                "the state of the optimizer is spread over the processes; call collect() on all of "
                "them, then state_dict() on the first"
            )
        whole = {**super().state_dict(), "state": self._collected}
        self._collected = None
        return whole

    def write_shadows(self) -> None:
        """As AdamWEMA.write_shadows.

        Raises:
            RuntimeError: weights are out of date, see `refresh`.
        """
        self._weights.check_readable(self.model)
        super().write_shadows()

    def _part(self, x: Tensor, parameter: Tensor) -> Tensor:
        return x.detach().view(-1)[self._parts[parameter]] if parameter in self._parts else x

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            part = self._part(parameter, parameter)
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(part)
        return state

    def _has_grad(self, parameter: Tensor) -> bool:
        return parameter in self._present

    def _grad_of(self, parameter: Tensor) -> Tensor | None:
        return self._grads[parameter] if parameter in self._present else None

    def _sum_of_squares(self, gradients: Any, shards: Any) -> Tensor:
        total = super()._sum_of_squares(gradients, shards)
        dist.all_reduce(total)
        return total

    def _cut(self, state: dict[int, dict[str, Tensor]], numbers: list[int]) -> dict[int, dict[str, Tensor]]:
        kept = {}
        for number, parameter in zip(numbers, self._all, strict=False):
            part = self._parts.get(parameter)
            if part is not None and state.get(number):
                kept[number] = {
                    **state[number],
                    **{name: state[number][name].reshape(-1)[part].clone() for name in _MOMENTS},
                }
        return kept
