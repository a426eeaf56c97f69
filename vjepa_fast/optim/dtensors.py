"""Cuts whole tensors into this process's shard and gathers shards into whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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
