"""Arguments of the mask operators, drawn at random or chosen, and the emulated thread block of the CUDA kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from vjepa_fast.common import extension
from vjepa_fast.config.mask_strategies import STRATEGIES
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.masking import mask_sample as mask_ops
from vjepa_fast.masking.mask_rules import BlockSpec, Grid

NAMES = [name for name, strategy in STRATEGIES.items() if strategy.number is not None]
"""The strategies that C++ draws."""

needs_extension = pytest.mark.skipif(
    extension.load().path is None, reason=f"needs the compiled extension: {extension.load().reason}"
)


@dataclass(frozen=True)
class Case:
    """Arguments of one batch."""

    masks: tuple[MaskSpec, ...]
    grid: Grid
    sample_ids: tuple[int, ...]
    members: tuple[int, ...]
    group_size: int
    seed: int = 239
    step: int = 0
    group: int = 0

    @property
    def specs(self) -> list[BlockSpec]:
        return [BlockSpec.from_config(mask, self.grid) for mask in self.masks]

    @property
    def key(self) -> tuple[list[int], Grid, int, int]:
        """specs, grid, seed and group of the operators."""
        ints = [value for spec in self.specs for value in spec.to_ints()]
        return ints, self.grid, mask_ops._signed(self.seed), self.group

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """step, sample_ids and members."""
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in ([self.step], self.sample_ids, self.members)
        )

    def reference(self) -> mask_ops.PackedMasks:
        masks = mask_ops.masks_ref(
            self.specs,
            self.grid,
            np.array(self.sample_ids, dtype=np.int64),
            np.array(self.members, dtype=np.int64),
            seed=self.seed,
            step=self.step,
            group=self.group,
            group_size=self.group_size,
        )
        return mask_ops._pack_ref(masks, None)

    def operators(self, device: str = "cpu", spare: int = 0) -> tuple[Tensor, ...]:
        """Lengths, then what mask_sample returns with `spare` elements more than needed."""
        ops = mask_ops.operators()
        assert ops is not None
        step, sample_ids, members = self.tensors(device)
        lengths = ops.mask_lengths(step, sample_ids, members, *self.key, self.group_size)
        totals = lengths.sum(1).tolist()
        return lengths, *ops.mask_sample(step, sample_ids, lengths, *self.key, *(total + spare for total in totals))

    def check(self, found: tuple[Tensor, ...], spare: int = 0) -> None:
        """That `found` (see operators) is the reference's."""
        expected = self.reference()
        lengths, context_ids, target_ids, cu_seqlens, totals = (tensor.cpu() for tensor in found)
        assert lengths.tolist() == [list(expected.context_lengths), list(expected.target_lengths)]
        for ids, wanted in ((context_ids, expected.context_ids), (target_ids, expected.target_ids)):
            assert torch.equal(ids[: len(wanted)], wanted)
            assert ids[len(wanted) :].tolist() == [0] * spare
        assert torch.equal(cu_seqlens, expected.cu_seqlens)
        assert totals.tolist() == lengths.sum(1).tolist()


def ranges(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def mask_specs(draw: Callable[..., Any]) -> MaskSpec:
    strategy = draw(st.sampled_from(NAMES))
    keys: dict[str, Any] = {
        "max_temporal_keep": draw(st.sampled_from([1.0, 1.0, 0.5, 0.1])),
        "max_keep": draw(st.sampled_from([None, None, 1, 5, 10**6])),
        "inv_block": draw(st.booleans()),
        **draw(st.sampled_from([{}, {}, {"full_complement": True}, {"pred_full_complement": True}])),
    }
    if strategy == "multiblock":
        scales = st.one_of(st.just((1.0, 1.0)), ranges(1e-3, 1.0))
        keys |= {
            "spatial_scale": draw(scales),
            "temporal_scale": draw(scales),
            "aspect_ratio": draw(st.one_of(ranges(0.3, 3.0), ranges(1e-3, 255.0))),
            "num_blocks": draw(st.integers(1, 9)),
        }
    else:
        keys["ratio"] = draw(st.floats(1e-6, 1 - 1e-6))
    if strategy == "mixture":
        keys["temporal_probability"] = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    return MaskSpec(strategy=strategy, **keys)


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    grid = draw(
        st.one_of(
            st.sampled_from([(1, 1, 1), (8, 8, 8), (4, 14, 14), (1, 1, 70), (70, 1, 1)]),
            st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
        )
    )
    first = draw(st.sampled_from([0, 5, 2**32 - 3, 2**61]))
    batch_size = draw(st.integers(1, 6))
    group_size = draw(st.sampled_from([-1, 0, 1, 2, 4]))
    sample_ids = draw(st.lists(st.integers(first, first + 9), min_size=batch_size, max_size=batch_size, unique=True))
    size = max(1, group_size)
    members = {size * (sample // size) + i for sample in sample_ids for i in range(size)}
    return Case(
        masks=tuple(draw(st.lists(mask_specs(), min_size=1, max_size=3))),
        grid=grid,
        sample_ids=tuple(sample_ids),
        members=tuple(draw(st.permutations(sorted(members)))),
        group_size=group_size,
        seed=draw(st.integers(0, 2**64 - 1)),
        step=draw(st.sampled_from([0, 1, 2**31, 2**32 - 1])),
        group=draw(st.integers(0, 15)),
    )


PLAIN = Case((MaskSpec(num_blocks=2), MaskSpec(strategy="mixture")), (4, 6, 6), (0, 1, 2), (0, 1, 2), -1)
FULL = MaskSpec(spatial_scale=(1.0, 1.0), num_blocks=1, aspect_ratio=(1.0, 1.0), max_keep=1)
EXAMPLES = (
    PLAIN,
    Case((FULL, MaskSpec(inv_block=True), MaskSpec(strategy="tube", inv_block=True)), (1, 1, 1), (7,), (7,), 0),
    Case((FULL,), (3, 5, 5), (1,), (0, 1), 2),
    Case((MaskSpec(num_blocks=1024), MaskSpec(strategy="patches")), (16, 24, 24), (3, 1), (3, 1), -1),
    Case((MaskSpec(num_blocks=8), MaskSpec(strategy="future")), (64, 24, 24), (0,), (0,), 0),
    Case((MaskSpec(strategy="tube", ratio=0.9), MaskSpec(strategy="mixture")), (2, 64, 64), (5,), (5,), 0),
)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def emulate(
    library: ctypes.CDLL,
    case: Case,
    num_threads: int,
    stride: int,
    capacity: tuple[int, int] | None = None,
    lengths: np.ndarray | None = None,
) -> tuple[Tensor, ...]:
    """As Case.operators; ids are poisoned before and guarded behind."""
    ids, members = (np.array(values, dtype=np.int64) for values in (case.sample_ids, case.members))
    specs, grid, seed, group = case.key
    common = [
        pointer(np_specs := np.array(specs)),
        ctypes.c_int64(len(case.masks)),
        pointer(np_grid := np.array(grid)),
        ctypes.c_int64(seed),
        ctypes.c_int64(group),
    ]
    threads = [ctypes.c_int64(num_threads), ctypes.c_int64(stride)]
    first = [ctypes.c_int64(case.step), pointer(ids), ctypes.c_int64(len(ids))]
    num_sequences = len(ids) * len(case.masks)
    if lengths is None:
        lengths = np.full((2, num_sequences), -77, dtype=np.int32)
        library.emulated_lengths(
            *first,
            pointer(members),
            ctypes.c_int64(len(members)),
            *common,
            ctypes.c_int64(case.group_size),
            *threads,
            pointer(lengths),
        )
    sizes = capacity or tuple(lengths.sum(1).tolist())
    guard = 8
    out = [np.full(size + guard, -77, dtype=np.int32) for size in (*sizes, 3 * (num_sequences + 1), 2)]
    library.emulated_sample(
        *first,
        pointer(lengths),
        *common,
        *(ctypes.c_int64(size) for size in sizes),
        *threads,
        *(pointer(array) for array in out),
    )
    assert np_specs.size and np_grid.size
    for array in out:
        assert (array[-guard:] == -77).all() and not (array[:-guard] == -77).any()
    context, target, cu_seqlens, totals = (torch.from_numpy(array[:-guard]) for array in out)
    return torch.from_numpy(lengths), context, target, cu_seqlens.view(3, -1), totals
