"""Communication of ZeRO-1: gradients one way, weights the other.

Gradients are added up bucket by bucket while the backward goes on, and each process gets the sum of its share alone.
Weights are brought together while the next step begins: what is read first comes first, and who reads waits for that.
Each of the two moves (n - 1) / n of the bytes, as each half of an all-reduce does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.layers import Block
from vjepa_fast.ops.linear import STALE, is_stale, mark_current, mark_shadow_fresh, mark_stale
from vjepa_fast.optim.flat_buffers import Bucket, Flat

# torch 2.13 has given them new names, and warns of the old ones. gloo of 2.13 has both, for fp32, fp64, bf16
# and fp16.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


IN_FLIGHT = 2
"""Buckets on their way while another is sent, which waits for the one before them. So whole gradients of a few blocks
are in memory, not those of all, and the network is busy all the same."""


@dataclass
class _Sent:
    """A bucket on its way."""

    work: dist.Work
    whole: Tensor | None
    """Until it has arrived."""
    share: Tensor

    def arrive(self) -> None:
        if self.whole is not None:
            self.work.wait()
            self.whole = None


class Gradients:
    """Averages gradients over all processes as the backward produces them.

    A parameter's gradient is taken from it when its bucket is complete. Buckets leave in one order on all processes.

    Args:
        buckets: in the order in which the backward completes them.
        dtype: in which gradients travel and are added up.
        optional: parameters that some steps do not use, on some processes or on all.
    """

    def __init__(self, buckets: Sequence[Bucket], dtype: torch.dtype, optional: Collection[Tensor] = ()) -> None:
        self.buckets, self.dtype = buckets, dtype
        self.optional = [p for bucket in buckets for p in bucket.parameters if p in set(optional)]
        self._paused = False
        self._begin()
        for number, bucket in enumerate(buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def _begin(self) -> None:
        self._missing = [set(bucket.parameters) for bucket in self.buckets]
        self._sent: list[_Sent] = []
        self._present: set[Tensor] = set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients of backwards within are kept and added up where they are."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if self._paused:
            return
        if number < len(self._sent):
            raise RuntimeError(
                "a second backward before the optimizer's step; all but the last of a step belong into "
                "`with optimizer.no_sync()`"
            )
        self._missing[number].discard(parameter)
        while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
            self._send(len(self._sent))

    def _send(self, number: int) -> None:
        bucket = self.buckets[number]
        whole = torch.zeros_like(bucket.weights.data, dtype=self.dtype)
        views = bucket.weights.views(whole)
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(views, bucket.parameters, strict=True)
            if parameter.grad is not None
        ]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])
        for parameter in bucket.parameters:
            if parameter.grad is not None:
                self._present.add(parameter)
                parameter.grad = None
        share = whole.new_empty(bucket.share.stop - bucket.share.start)
        work = reduce_scatter(share, whole, async_op=True)
        self._sent.append(_Sent(work, whole, share))
        if number >= IN_FLIGHT:
            self._sent[number - IN_FLIGHT].arrive()

    def flush(self) -> None:
        """Send what has not left by itself: buckets without some gradient, and those behind them."""
        for number in range(len(self._sent), len(self.buckets)):
            self._send(number)

    def finish(self) -> tuple[list[Tensor], set[Tensor]]:
        """Wait for everything.

        Returns:
            For each bucket the share of this process, [elements], in the dtype of its weights; and the parameters that
            have a gradient, the same on all processes.

        Raises:
            RuntimeError: a parameter that is not optional has none.
        """
        self.flush()
        sent, present = self._sent, self._present
        self._begin()
        if self.optional:
            # On the host, which makes the lists of the update.
            used = torch.tensor([parameter in present for parameter in self.optional], dtype=torch.int32)
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            present |= {p for p, anywhere in zip(self.optional, used.tolist(), strict=True) if anywhere}
        shares, num_processes = [], dist.get_world_size()
        for bucket, flight in zip(self.buckets, sent, strict=True):
            flight.arrive()
            shares.append(flight.share.to(bucket.weights.data.dtype).div_(num_processes))
        absent = [p for bucket in self.buckets for p in bucket.parameters if p not in present]
        if set(absent) - set(self.optional):
            raise RuntimeError(
                f"{len(absent)} parameters, one of shape {list(absent[0].shape)}, have no gradient in "
                "this step, though they are trained"
            )
        return shares, present


class _Gather:
    """Brings the shares of a buffer together, in place and in the background."""

    def __init__(self, flat: Flat, share: slice) -> None:
        self.flat, self.share = flat, share
        self._work: dist.Work | None = None

    def start(self) -> None:
        self._work = self._gather(self.flat.data if self.flat.half is None else self.flat.half)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def refresh(self) -> None:
        """Masters whose copies alone are brought together otherwise."""
        if self.flat.half is not None:
            self._gather(self.flat.data).wait()

    def _gather(self, whole: Tensor) -> dist.Work:
        work: dist.Work = all_gather(whole, whole[self.share], async_op=True)
        return work


class _Wait:
    """What somebody calls who is about to read a network."""

    def __init__(self, weights: Weights, gathers: Sequence[_Gather], reader: nn.Module) -> None:
        self.weights, self.gathers, self.reader = weights, gathers, reader

    def __call__(self) -> None:
        for gather in self.gathers:
            gather.wait()

    def __deepcopy__(self, memo: object) -> None:
        # For a copy of a network there is nothing to wait for, if it is a copy of what is right.
        self.weights.check_readable(self.reader)


class Weights:
    """Brings updated weights to all processes, those of the target encoder's first blocks first.

    Of layers that multiply in half precision the copies in half precision travel. Their fp32 masters are then out of
    date on processes that do not update them, until `refresh`; who would read them gets a RuntimeError.

    Args:
        model: whose networks and blocks wait for their weights.
        buckets: of the model, as make_buckets orders them.
    """

    def __init__(self, model: VJEPA, buckets: Sequence[Bucket]) -> None:
        self._behind = False
        inside = [bucket for bucket in reversed(buckets) if bucket.blocks]
        outside = [bucket for bucket in buckets if not bucket.blocks]
        first = [_Gather(flat, bucket.share) for bucket in outside for flat in bucket.flats]
        self._gathers = list(first)
        for bucket in inside:
            if bucket.targets is not None:
                self._add(bucket.targets, bucket, bucket.target_blocks)
        for of_encoder in (True, False):
            for bucket in inside:
                if (bucket.targets is not None) == of_encoder:
                    self._add(bucket.weights, bucket, bucket.blocks)
        for network in (model.encoder, model.predictor, model.target_encoder):
            network.before = _Wait(self, first, network)
            network.register_state_dict_pre_hook(lambda network, *_: self.check_readable(network))
            network.register_load_state_dict_pre_hook(lambda *_: self.wait())

    def _add(self, flat: Flat, bucket: Bucket, blocks: Sequence[Block]) -> None:
        gather = _Gather(flat, bucket.share)
        self._gathers.append(gather)
        for block in blocks:
            block.before = _Wait(self, [gather], block)

    def start(self) -> None:
        """Bring the weights together, in the background; a collective."""
        for gather in self._gathers:
            flat = gather.flat
            if flat.half is not None:
                self._behind = True
                for master, copy in zip(flat.tensors, flat.views(flat.half), strict=True):
                    mark_shadow_fresh(master, copy)
                    mark_stale(master)
            gather.start()

    def wait(self) -> None:
        """Until all that has been started is done."""
        for gather in self._gathers:
            gather.wait()

    def refresh(self) -> None:
        """Bring the masters up to date; a collective."""
        self.wait()
        if not self._behind:
            return
        for gather in self._gathers:
            gather.refresh()
            for master in gather.flat.tensors:
                mark_current(master)
        self._behind = False

    def check_readable(self, reader: nn.Module) -> None:
        """Wait until the masters of a module can be read.

        Raises:
            RuntimeError: some are out of date.
        """
        self.wait()
        if any(map(is_stale, reader.parameters())):
            raise RuntimeError(STALE)
