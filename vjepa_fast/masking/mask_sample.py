"""Draws, truncates and packs the masks of a batch with the operators of csrc/ or NumPy, bit-identically.

The rules are those of vjepa_fast.masking.mask_rules. The operators:

    vjepa_fast::mask_lengths(step, sample_ids, members, specs, grid, seed, group, group_size) -> int32 [2, S]
    vjepa_fast::mask_sample(step, sample_ids, lengths, specs, grid, seed, group, capacity_context, capacity_target)
        -> context_ids, target_ids, cu_seqlens, totals
    vjepa_fast::philox4x32(counter, key0, key1) -> int64 [n, 4]

`step` is an int64 tensor of one element, so that the replay of a CUDA graph draws new masks. Lengths come first and are
cheap on the host, so a device is never asked for them: `mask_sample` copies them to the GPU in one transfer from pinned
memory and makes all masks of the batch in one launch. In a graph, `mask_sample_captured` computes them on the device.

Bytes: 4 (1 + share of tokens kept) N a sequence written; nothing of size is read.

Legend: B clips, M masks, S = M * B sequences (mask by mask, in each clip by clip), N = T * H * W tokens, K members.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_fast.common import extension
from vjepa_fast.common.rng import split_seed
from vjepa_fast.masking.mask_rules import BlockSpec, Grid, mask_sample_ref


@dataclass(frozen=True)
class PackedMasks:
    """Masks of B clips, packed; see MaskBatch."""

    context_ids: Tensor
    """int32 [capacity or sum of lengths], zeros behind the sum; likewise target_ids."""
    target_ids: Tensor
    cu_seqlens: Tensor
    """int32 [3, S + 1]: where each sequence's context, target, and both together begin, ending with the total."""
    context_lengths: tuple[int, ...]
    """[S], on the host; likewise target_lengths."""
    target_lengths: tuple[int, ...]


def _first(mask: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The first keep[s] true entries of each row."""
    return mask & (np.cumsum(mask, axis=1) <= keep[:, None])


def _shortest(mask: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """For each row, the smallest count among the rows of its part."""
    counts = mask.sum(axis=1)
    _, inverse = np.unique(parts, return_inverse=True)
    shortest = np.full(len(mask), mask.shape[1])
    np.minimum.at(shortest, inverse, counts)
    return shortest[inverse]


def truncation_parts(members: np.ndarray, group_size: int) -> np.ndarray:
    """Which truncation group each global sample number is in.

    Args:
        members: [K] global sample numbers.
        group_size: clips of a truncation group; 0: each clip is its own (no truncation); -1: all are one.
    """
    if group_size == 0:
        return members
    return np.zeros_like(members) if group_size < 0 else members // group_size


def _check_samples(sample_ids: np.ndarray, members: np.ndarray) -> None:
    if len(members) and int(members.min()) < 0:
        raise ValueError(f"a global sample number is {int(members.min())}; expected numbers from 0")
    if members is not sample_ids and not np.isin(sample_ids, members).all():
        missing = int(np.setdiff1d(sample_ids, members)[0])
        raise ValueError(
            f"sample {missing} is not among the members; members are all samples of the truncation groups of sample_ids"
        )


def masks_ref(
    specs: Sequence[BlockSpec],
    grid: Grid,
    sample_ids: np.ndarray,
    members: np.ndarray,
    *,
    seed: int,
    step: int,
    group: int = 0,
    group_size: int = 0,
) -> np.ndarray:
    """Masks after every rule, as booleans.

    Args:
        specs: M masks in integers.
        grid: (T, H, W) in tokens.
        sample_ids: int64 [B] global sample numbers.
        members: int64 [K] every global sample number of this frames-per-clip group in the truncation groups of
            `sample_ids`.
        seed, step: of the run.
        group: which frames-per-clip group, in the order of the configuration.
        group_size: see truncation_parts.

    Returns:
        bool [2, M, B, N]: context, target.

    Raises:
        ValueError: a sample that is not among the members, or a negative one.
    """
    _check_samples(sample_ids, members)
    members = np.unique(members)
    rows = np.searchsorted(members, sample_ids)
    parts = truncation_parts(members, group_size)
    out = np.empty((2, len(specs), len(sample_ids), grid[0] * grid[1] * grid[2]), dtype=bool)
    for mask, spec in enumerate(specs):
        context = mask_sample_ref(spec, grid, members, seed=seed, step=step, group=group, mask=mask)
        num_context, num_target = _shortest(context, parts), _shortest(~context, parts)
        if spec.max_keep is not None:
            num_context = np.minimum(num_context, spec.max_keep)
        context, target = _first(context[rows], num_context[rows]), _first(~context[rows], num_target[rows])
        if spec.complement == "full":
            target = ~context
        elif spec.complement == "pred_full":
            context = ~target
        swapped = spec.inv_block & target.any(axis=1, keepdims=True)
        out[0, mask], out[1, mask] = np.where(swapped, target, context), np.where(swapped, context, target)
    return out


def _pack_ref(masks: np.ndarray, capacity: tuple[int, int] | None) -> PackedMasks:
    """Args: masks: bool [2, M, B, N]."""
    lengths = masks.sum(-1).reshape(2, -1)
    ids = []
    for kind, mask in enumerate(masks):
        own = np.nonzero(mask.reshape(-1, mask.shape[-1]))[1].astype(np.int32)
        ids.append(np.pad(own, (0, 0 if capacity is None else capacity[kind] - len(own))))
    ends = np.cumsum([*lengths, lengths.sum(0)], axis=1)
    cu_seqlens = np.pad(ends, ((0, 0), (1, 0))).astype(np.int32)
    return PackedMasks(
        torch.from_numpy(ids[0]),
        torch.from_numpy(ids[1]),
        torch.from_numpy(cu_seqlens),
        tuple(lengths[0].tolist()),
        tuple(lengths[1].tolist()),
    )


@cache
def _register_fakes() -> None:
    @torch.library.register_fake("vjepa_fast::mask_lengths")
    def _(step, sample_ids, members, specs, grid, seed, group, group_size):  # type: ignore[no-untyped-def]
        num_masks = len(specs) // BlockSpec.NUM_INTS
        return sample_ids.new_empty((2, num_masks * sample_ids.shape[0]), dtype=torch.int32)

    @torch.library.register_fake("vjepa_fast::mask_sample")
    def _(  # type: ignore[no-untyped-def]
        step, sample_ids, lengths, specs, grid, seed, group, capacity_context, capacity_target
    ):
        num_sequences = len(specs) // BlockSpec.NUM_INTS * sample_ids.shape[0]
        shapes = ((capacity_context,), (capacity_target,), (3, num_sequences + 1), (2,))
        return tuple(sample_ids.new_empty(shape, dtype=torch.int32) for shape in shapes)

    @torch.library.register_fake("vjepa_fast::philox4x32")
    def _(counter, key0, key1):  # type: ignore[no-untyped-def]
        return torch.empty_like(counter)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def operators() -> Any | None:
    """torch.ops.vjepa_fast; None where NumPy serves: without the extension (one warning), or VJEPA_FAST_OPS=ref."""
    if os.environ.get("VJEPA_FAST_OPS") == "ref":
        return None
    found = extension.load()
    if found.path is None:
        if found.wanted:
            _warn_once(
                f"masks are drawn by NumPy, the same ones but slower: {found.reason}. Install again with a C++ "
                "compiler, or set VJEPA_FAST_OPS=ref to choose NumPy without this warning"
            )
        return None
    _register_fakes()
    return torch.ops.vjepa_fast


def runs_on(device: torch.device) -> bool:
    """Whether the operators have kernels for this device; on a GPU the first question waits for it."""
    if operators() is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and _runs_on_gpu(device))


@cache
def _runs_on_gpu(device: torch.device) -> bool:
    """Draw some numbers: the GPU may be older than the kernels, the driver older than their runtime."""
    if not extension.load().cuda_architectures:
        return False
    philox4x32 = torch.ops.vjepa_fast.philox4x32
    counter = torch.arange(40).view(10, 4)
    try:
        right = torch.equal(philox4x32(counter.to(device), 1, 2).cpu(), philox4x32(counter, 1, 2))
        problem = "they give wrong numbers"
    except RuntimeError as error:
        right, problem = False, str(error).splitlines()[0]
    if not right:
        _warn_once(f"the CUDA kernels of vjepa-fast cannot be used on {device}, masks are drawn on the host: {problem}")
    return right


def _signed(seed: int) -> int:
    """A seed modulo 2**64 as the signed integer that an operator takes."""
    low, high = split_seed(seed)
    return (high << 32 | low) - (high >> 31 << 64)


def _host_only(specs: Sequence[BlockSpec]) -> str | None:
    """A strategy that the operators do not know, where one of the masks has one."""
    return next((spec.strategy for spec in specs if spec.number is None), None)


def mask_sample(
    specs: Sequence[BlockSpec],
    grid: Grid,
    sample_ids: np.ndarray,
    members: np.ndarray,
    *,
    seed: int,
    step: int,
    group: int = 0,
    group_size: int = 0,
    device: torch.device | str = "cpu",
    capacity: tuple[int, int] | None = None,
) -> PackedMasks:
    """All masks of a batch, packed, on a device, which is not waited for.

    NumPy draws them where one of the strategies exists in Python only.

    Args:
        specs, grid, sample_ids, members, seed, step, group, group_size: see masks_ref.
        device: where the ids shall be.
        capacity: elements of context_ids and target_ids; None: the sums of the lengths.

    Raises:
        ValueError: a sample that is not among the members or is negative, more tokens than capacity, or a GPU that
            torch cannot use.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device}, but torch {torch.__version__} finds no GPU that it can use; masks can "
            "be drawn on the cpu"
        )
    ops = operators() if _host_only(specs) is None else None
    _check_samples(sample_ids, members)
    if ops is None:
        masks = masks_ref(specs, grid, sample_ids, members, seed=seed, step=step, group=group, group_size=group_size)
        _check_capacity(masks.sum((1, 2, 3)).tolist(), capacity)
        return _to(_pack_ref(masks, capacity), device)
    key = ([value for spec in specs for value in spec.to_ints()], grid, _signed(seed), group)
    num_samples = len(sample_ids)
    # Step, samples and lengths travel together: one transfer.
    num_sequences = len(specs) * num_samples
    inputs = torch.empty(1 + num_samples + num_sequences, dtype=torch.int64, pin_memory=device.type == "cuda")

    def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, ids, lengths = packed.split([1, num_samples, num_sequences])
        return first, ids, lengths.view(torch.int32).view(2, num_sequences)

    step_tensor, ids, lengths = split(inputs)
    step_tensor.fill_(step)
    ids.copy_(torch.from_numpy(sample_ids))
    same = members is sample_ids
    lengths.copy_(ops.mask_lengths(step_tensor, ids, ids if same else torch.from_numpy(members), *key, group_size))
    context_lengths, target_lengths = (tuple(row) for row in lengths.tolist())
    totals = sum(context_lengths), sum(target_lengths)
    _check_capacity(totals, capacity)
    if runs_on(device):
        arguments = split(inputs.to(device, non_blocking=True))
        context, target, cu_seqlens, _ = ops.mask_sample(*arguments, *key, *(capacity or totals))
        return PackedMasks(context, target, cu_seqlens, context_lengths, target_lengths)
    context, target, cu_seqlens, _ = ops.mask_sample(step_tensor, ids, lengths, *key, *(capacity or totals))
    return _to(PackedMasks(context, target, cu_seqlens, context_lengths, target_lengths), device)


def mask_sample_captured(
    specs: Sequence[BlockSpec],
    grid: Grid,
    step: Tensor,
    sample_ids: Tensor,
    members: Tensor,
    *,
    seed: int,
    capacity: tuple[int, int],
    group: int = 0,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All masks of a batch, lengths included, from tensors on the device: for CUDA graphs, where the host may not know.

    Args:
        specs, grid, seed, group, group_size: see masks_ref.
        step: int64 [1].
        sample_ids: int64 [B].
        members: int64 [K]. On a GPU their values are not checked: a sample that is not a member gets empty masks.
        capacity: elements of context_ids and target_ids.

    Returns:
        context_ids, target_ids and cu_seqlens as in PackedMasks, and int32 [2] the tokens wanted. Where a total is more
        than its capacity, the ids behind the capacity are missing and cu_seqlens stops at it; the host must look.

    Raises:
        RuntimeError: the extension has no kernels for the device or does not know a strategy, or arguments that do not
            fit.
    """
    if _host_only(specs) is not None:
        raise RuntimeError(f"masks of strategy {_host_only(specs)} are drawn in Python, on the host only")
    if not runs_on(step.device):
        raise RuntimeError(
            f"masks can be drawn on {step.device} only by the extension: "
            f"{extension.load().reason or 'it has no kernels for this device'}"
        )
    ops = operators()
    assert ops is not None
    key = ([value for spec in specs for value in spec.to_ints()], grid, _signed(seed), group)
    lengths = ops.mask_lengths(step, sample_ids, members, *key, group_size)
    return ops.mask_sample(step, sample_ids, lengths, *key, *capacity)


def _check_capacity(totals: Sequence[int], capacity: tuple[int, int] | None) -> None:
    for name, total, room in zip(("context", "target"), totals, capacity or totals, strict=True):
        if total > room:
            raise ValueError(f"the masks hold {total} {name} tokens, more than the capacity of {room}")


def _to(masks: PackedMasks, device: torch.device) -> PackedMasks:
    if device.type == "cpu":
        return masks

    def move(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return replace(
        masks, context_ids=move(masks.context_ids), target_ids=move(masks.target_ids), cu_seqlens=move(masks.cu_seqlens)
    )
