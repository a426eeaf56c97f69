"""Tells what this process has of a tensor; cuts whole tensors into shards and gathers shards into whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_of(x: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is. No gradient flows through."""
    # Not to_local: it makes a view for each of hundreds of parameters at every step.
    return x._local_tensor if isinstance(x, DTensor) else x


def keep_part(x: Tensor, part: slice) -> None:
    """Declare that this process keeps these elements of a tensor up to date, and others those that are left."""
    x._vf_part = part  # type: ignore[attr-defined]


def kept_of(x: Tensor) -> Tensor:
    """What this process keeps up to date of a parameter: its shard of a DTensor, its part, [n], where `keep_part` says
    so, else all."""
    part: slice | None = getattr(x, "_vf_part", None)
    return local_of(x).detach() if part is None else x.detach().view(-1)[part]


def place_of(x: Tensor) -> int:
    """Differs where a tensor lies elsewhere than before."""
    local = local_of(x)
    return id(local) if isinstance(local, FakeTensor) else local.data_ptr()


Shards = tuple[DeviceMesh | None, tuple[int, ...]]
"""The mesh of a DTensor and those of its dimensions over which it is sharded; (None, ()) for other tensors."""


def shards_of(x: Tensor) -> Shards:
    """How a tensor is sharded."""
    if not isinstance(x, DTensor):
        return None, ()
    assert not any(placement.is_partial() for placement in x.placements)
    # Not is_shard: the shards of a tensor that is split twice along one dimension are of another class.
    return x.device_mesh, tuple(dim for dim, placement in enumerate(x.placements) if not placement.is_replicate())


def cut_like(own: Tensor, whole: Tensor) -> Tensor:
    """`whole`, or as a DTensor this process's shard of it where `own` is one. Of a file that is mapped into memory only
    the shard is read.

    Args:
        own, whole: of the same shape; a shard already is handed back.
    """
    if not isinstance(own, DTensor) or isinstance(whole, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(own.shape, own.device_mesh, own.placements)
    local = whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
    # Not a view of all of it, which would stay in memory.
    local = local.to(own.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def gather(value: Any, keep: bool) -> Any:
    """Nested dicts and lists with every tensor in the host's memory: a DTensor whole, any other as a copy. A
    collective, in the order of the entries.

    Args:
        value: the same on all processes but for the contents of tensors.
        keep: False: this process has no use for it, and gets empty tensors.
    """
    if isinstance(value, Tensor):
        whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().to("cpu", copy=whole is value) if keep else whole.new_empty(0)
    if isinstance(value, dict):
        return {key: gather(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(item, keep) for item in value)
    return value
