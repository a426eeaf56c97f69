"""Handing the last addition of a block to the norm that reads its output."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.flops import CountFlops
from tests.helpers.packed import config
from vjepa_fast.models.layers import Block, make_blocks, run_blocks
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.ops.packing import Packing

PACKING = Packing((3, 4), torch.tensor([0, 3, 7], dtype=torch.int32))


def some_blocks(drop_path: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    return make_blocks(3, 16, 2, 2.0, drop_path, False, True)


def one_by_one(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    outputs = []
    for block in blocks:
        x = block(x, PACKING, None)
        outputs.append(x)
    return outputs


def handed_over(blocks: nn.ModuleList, x: Tensor, checkpointing: str = "none") -> list[Tensor]:
    stream = run_blocks(blocks, x, PACKING, None, checkpointing)
    return [x if branch is None else x + branch for x, branch in stream]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_same_bits_as_one_block_after_another(drop_path, checkpointing):
    results = []
    for run in (one_by_one, lambda blocks, x: handed_over(blocks, x, checkpointing)):
        blocks, x = some_blocks(drop_path), torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
        leaves = [x.requires_grad_(), *blocks.parameters()]
        torch.manual_seed(2)
        outputs = run(blocks, x)
        results.append([*outputs, *torch.autograd.grad(outputs[-1].square().sum(), leaves)])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("look", ["at nothing", "at the block", "within"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_last_block_for_some_tokens_only(drop_path, look, checkpointing):
    rows, results, sizes = torch.tensor([1, 5, 6, 2]), [], []
    for wanted in (None, rows):
        blocks, x = some_blocks(drop_path), torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
        leaves = [x.requires_grad_(), *blocks.parameters()]
        blocks[-1].mlp.fc1.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]))) if (
            look == "within"
        ) else None
        if look == "at the block":
            blocks[-1].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
        torch.manual_seed(2)
        *_, (x_out, branch) = run_blocks(blocks, x, PACKING, None, checkpointing, wanted)
        out = x_out if branch is None else x_out + branch
        out = out[rows] if wanted is None else out
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])
    assert set(sizes) <= {7}


def test_last_block_does_less_for_some_tokens():
    blocks, x = some_blocks(), torch.randn(7, 16)
    with CountFlops() as whole:
        handed_over(blocks, x)
    with CountFlops() as part:
        deque(run_blocks(blocks, x, PACKING, None, last_rows=torch.tensor([1, 5, 6, 2])))
    # Projection and MLP of three tokens: five products of width x width, a multiply-add as two.
    assert whole.total - part.total == 3 * 5 * 2 * 16 * 16


def test_additions_are_deferred_except_where_that_would_cost_memory():
    blocks, x = some_blocks(), torch.randn(7, 16, requires_grad=True)
    assert [branch is None for _, branch in run_blocks(blocks, x, PACKING, None, "none")] == [False] * 3
    assert [branch is None for _, branch in run_blocks(blocks, x, PACKING, None, "full")] == [True] * 3
    with torch.no_grad():
        assert [branch is None for _, branch in run_blocks(blocks, x, PACKING, None, "full")] == [False] * 3


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_whole_tensors(kind):
    blocks, x = some_blocks(), torch.randn(7, 16, requires_grad=True)
    plain = [x, *one_by_one(blocks, x)]
    (wanted_grad,) = torch.autograd.grad(plain[-1].sum(), plain[1])
    seen = []
    getattr(blocks[1], f"register_{kind}_hook")(lambda module, *args: seen.append(args) and None)
    outputs = handed_over(blocks, x)
    assert all(torch.equal(ours, other) for ours, other in zip(outputs, plain[1:], strict=True))
    outputs[-1].sum().backward()
    (args,) = seen
    found = {
        "forward": lambda: args[1],
        "forward_pre": lambda: args[0][0],
        "full_backward": lambda: args[0][0],
        "full_backward_pre": lambda: args[0][0],
    }[kind]()
    if "backward" not in kind:
        assert torch.equal(found, plain[2 if kind == "forward" else 1])
    elif kind == "full_backward":
        torch.testing.assert_close(found, wanted_grad)
    else:
        assert isinstance(found, Tensor) and len(args[0]) == 1


def test_wrapped_blocks_and_global_hooks_see_whole_tensors():
    blocks, x = some_blocks(), torch.randn(7, 16)
    plain = one_by_one(blocks, x)
    stock, seen = blocks[1].forward, []
    blocks[1].forward = lambda x, packing, rope: seen.append(x) or stock(x, packing, rope)
    assert torch.equal(handed_over(blocks, x)[-1], plain[-1]) and torch.equal(seen[0], plain[0])
    del blocks[1].forward, seen[:]
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out) if isinstance(module, Block) else None
    )
    try:
        handed_over(blocks, x)
    finally:
        handle.remove()
    assert len(seen) == len(blocks) and all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


def test_foreign_blocks_keep_their_signature():
    class Doubling(nn.Module):
        def forward(self, x: Tensor, packing: Packing, rope: None) -> Tensor:
            return 2 * x

    blocks, x = some_blocks(), torch.randn(7, 16)
    blocks[1] = Doubling()
    assert torch.equal(handed_over(blocks, x)[-1], one_by_one(blocks, x)[-1])


@pytest.mark.parametrize("final_norm", [True, False])
def test_encoder_ends_with_the_whole_sum(final_norm):
    cfg = config(depth=2)
    torch.manual_seed(0)
    encoder, clips = VisionTransformer(cfg.model), torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    seen: list[Tensor] = []
    ours, _ = encoder.forward_packed([clips], final_norm=final_norm)
    encoder.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    encoder.forward_packed([clips], final_norm=final_norm)
    assert torch.equal(ours, encoder.norm(seen[0]) if final_norm else seen[0])


def test_encoder_returns_the_normed_output_of_each_layer():
    cfg = config(depth=3)
    torch.manual_seed(0)
    encoder, clips = VisionTransformer(cfg.model, [0, 2]), torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    ours, seen = encoder(clips), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    encoder(clips)
    for out, index in zip(ours, (0, 2), strict=True):
        assert torch.equal(out.flatten(0, 1), encoder.norm(seen[index]))
