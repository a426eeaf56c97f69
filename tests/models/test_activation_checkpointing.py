"""Recomputing blocks, wholly or selectively: the same gradients with less kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.models.layers import make_blocks, run_blocks
from vjepa_fast.ops.packing import Packing
from vjepa_fast.ops.rope3d import Rope

KINDS = ("none", "full", "selective")


class Record(TorchDispatchMode):
    """Counts operators, and knows what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.name().partition("::")[2].partition(".")[0]] += 1
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, without: list[Tensor]) -> int:
        """Bytes that are still there."""
        known = {x.untyped_storage()._cdata for x in without}
        return sum(size for ref, size in self.storages.values() if ref.cdata not in known and not ref.expired())


def run(
    kind: str,
    swiglu: bool = False,
    dtype: torch.dtype = torch.float32,
    rope: bool = True,
    width: int = 96,
    lengths: tuple[int, ...] = (24, 40),
) -> tuple[list[Tensor], float, Counter[str]]:
    """Gradients of two blocks and their input; what a block keeps, in multiples of its input; how often what ran."""
    torch.manual_seed(0)
    blocks = make_blocks(2, width, 2, 4.0, 0.0, swiglu, True)
    total = sum(lengths)
    packing = Packing(lengths, torch.tensor([0, *lengths]).cumsum(0).int())
    rotation = Rope(torch.arange(total) % 32, (2, 4, 4), width // 2, dtype) if rope else None
    x = torch.randn(total, width, dtype=dtype, requires_grad=True)
    with Record() as record:
        *_, (out, branch) = run_blocks(blocks, x, packing, rotation, kind)
        out = out if branch is None else out + branch
        del branch
        kept = record.alive([*blocks.parameters()]) / 2 / (x.numel() * x.element_size())
        grads = torch.autograd.grad(out.float().square().sum(), [x, *blocks.parameters()])
    return list(grads), kept, record.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_the_same_bits(swiglu, dtype, rope):
    plain, full, selective = (run(kind, swiglu, dtype, rope)[0] for kind in KINDS)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, full, selective, strict=True))


def test_selective_recomputation_repeats_no_product_and_keeps_less():
    (_, plain, once), (_, full, whole), (_, selective, some) = (run(kind) for kind in KINDS)
    for name in ("addmm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert some[name] == once[name] < whole[name]
    assert some["native_layer_norm"] > once["native_layer_norm"]
    # The input; queries, keys and values, attention's result, its projection, 4 + 1 of the MLP: 10 with the input 11.
    assert full < 2 < selective < 12 < plain


def test_the_reference_key_means_all_of_a_block():
    assert ModelConfig().checkpointing == "none"
    assert ModelConfig(use_activation_checkpointing=True).checkpointing == "full"
    both = ModelConfig(use_activation_checkpointing=True, activation_checkpointing="selective")
    assert both.checkpointing == "selective"
