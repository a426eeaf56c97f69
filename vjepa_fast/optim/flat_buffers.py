"""Flat buffers of parameters, of which each process owns a share.

A bucket holds the linear layers of one block of a network, or of several where blocks are small: what a backward is
through with at about one time. All else (norms, patch embedding, mask tokens) is little, and makes one bucket for the
encoder and one for the predictor. A parameter, and what follows it in the target encoder, becomes a view of the
bucket's buffer, so that one collective moves them all and nothing is copied before or after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.layers import Block
from vjepa_fast.ops.linear import Linear

BUCKET_BYTES = 25 * 2**20
"""Of gradients in fp32, from which on a bucket takes no further block; the default of DistributedDataParallel."""

UNIT = 64
"""A share begins at a multiple of so many elements, a parameter at a quarter of it: kernels load 16 at a time."""


class Flat:
    """Tensors that are views of one buffer.

    Attributes:
        tensors: in its order.
        data: [elements].
        half: [elements], a copy in half precision; None: there is none.
    """

    def __init__(self, tensors: Sequence[Tensor], starts: Sequence[int], size: int) -> None:
        self.tensors, self._starts = list(tensors), starts
        self.data = tensors[0].new_zeros(size, requires_grad=False)
        self.half: Tensor | None = None
        for tensor, view in zip(tensors, self.views(self.data), strict=True):
            view.copy_(tensor.detach())
            tensor.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """What stands for each tensor in a buffer [elements], in its shape."""
        return [
            flat[start : start + tensor.numel()].view(tensor.shape)
            for start, tensor in zip(self._starts, self.tensors, strict=True)
        ]

    def keep_half(self, dtype: torch.dtype) -> dict[Tensor, Tensor]:
        """Make `half`; its views by the tensors that they are copies of."""
        self.half = torch.empty_like(self.data, dtype=dtype)
        return dict(zip(self.tensors, self.views(self.half), strict=True))


class Bucket:
    """Parameters in one flat buffer.

    Attributes:
        parameters: in the order of the buffer, of one dtype and on one device.
        size: of the buffer, in elements.
        share: elements of this process.
        parts: parameters of which this process has a part, and which of their elements that is.
        weights: the parameters.
        targets: what follows them in the target encoder; None for the predictor.
        blocks, target_blocks: whose linear layers these are; none: what lies outside of blocks.

    Args:
        parameters: as the attribute; moved into the buffer.
        targets: what follows each of them, or nothing for any.
        rank, world_size: of this process.
        blocks, target_blocks: as the attributes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        targets: Mapping[Tensor, Tensor],
        rank: int,
        world_size: int,
        blocks: Sequence[Block] = (),
        target_blocks: Sequence[Block] = (),
    ) -> None:
        self.parameters = list(parameters)
        self.blocks, self.target_blocks = list(blocks), list(target_blocks)
        starts: list[int] = []
        end, step = 0, UNIT // 4
        for parameter in self.parameters:
            starts.append(end)
            end += -(-parameter.numel() // step) * step
        length = -(-end // (world_size * UNIT)) * UNIT
        self.size = world_size * length
        self.share = slice(rank * length, (rank + 1) * length)
        self.parts: dict[Tensor, slice] = {}
        self._places: list[int] = []
        for start, parameter in zip(starts, self.parameters, strict=True):
            first, last = max(self.share.start - start, 0), min(self.share.stop - start, parameter.numel())
            if first < last:
                self.parts[parameter] = slice(first, last)
                self._places.append(start + first - self.share.start)
        self.weights = Flat(self.parameters, starts, self.size)
        followers = [targets[parameter] for parameter in self.parameters if parameter in targets]
        self.targets = Flat(followers, starts, self.size) if followers else None

    @property
    def flats(self) -> list[Flat]:
        return [self.weights] if self.targets is None else [self.weights, self.targets]

    def own(self, share: Tensor) -> dict[Tensor, Tensor]:
        """Where the parts of this process lie within its share of a buffer, [elements]."""
        return {
            parameter: share[first : first + part.stop - part.start]
            for (parameter, part), first in zip(self.parts.items(), self._places, strict=True)
        }


def make_buckets(model: VJEPA, left_out: Iterable[str], rank: int, world_size: int) -> list[Bucket]:
    """The buckets of a model in the order in which a backward is through with them.

    Args:
        model: whose parameters are moved into the buffers.
        left_out: names of parameters that stay where they are, beside those without a gradient; none is of a linear
            layer in a block.
        rank, world_size: of this process.
    """
    names = set(left_out)
    wanted = {p for name, p in model.named_parameters() if p.requires_grad and name not in names}
    targets: dict[Tensor, Tensor] = dict(
        zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True)
    )
    encoder, followers = _blocks(model.encoder.blocks), _blocks(model.target_encoder.blocks)
    buckets = []
    for group in _groups(_blocks(model.predictor.predictor_blocks)):
        buckets.append(Bucket(_linears(group), {}, rank, world_size, group))
    for group in _groups(encoder):
        following = [followers[encoder.index(block)] for block in group]
        buckets.append(Bucket(_linears(group), targets, rank, world_size, group, following))
    inside = {parameter for bucket in buckets for parameter in bucket.parameters}
    for network in (model.predictor, model.encoder):
        rest = [p for p in network.parameters() if p in wanted and p not in inside]
        buckets.append(Bucket(rest, targets, rank, world_size))
    return buckets


def _blocks(modules: nn.ModuleList) -> list[Block]:
    blocks = [block for block in modules if isinstance(block, Block)]
    assert len(blocks) == len(modules)
    return blocks


def _linears(blocks: Sequence[Block]) -> list[Tensor]:
    return [p for block in blocks for layer in block.modules() if isinstance(layer, Linear) for p in layer.parameters()]


def _groups(blocks: Sequence[Block]) -> list[list[Block]]:
    """Consecutive blocks, the last ones first, each group just large enough; the first ones may be fewer."""
    groups: list[list[Block]] = []
    room = 0
    for block in reversed(blocks):
        if room <= 0:
            groups.append([])
            room = BUCKET_BYTES // torch.float32.itemsize
        groups[-1].insert(0, block)
        room -= sum(parameter.numel() for parameter in _linears([block]))
    return groups
