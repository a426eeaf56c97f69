"""Attention over packed sequences by every back end: target encoder (whole clips), context encoder and predictor.

The shapes are those of a step: for ViT-L at 256 px 24 x 2048 tokens with heads of 64, the context of both masks, and
context and targets of both masks with the predictor's heads of 32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vjepa_fast.bench.timing import randn
from vjepa_fast.bench.workload import Workload
from vjepa_fast.cost import flops
from vjepa_fast.ops.attention import choice
from vjepa_fast.ops.attention.backends import NAMES
from vjepa_fast.ops.attention.op import attention
from vjepa_fast.ops.packing import Packing


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("part", "mode"),
    [
        ("target", "forward"),
        ("context", "forward"),
        ("context", "forward_backward"),
        ("predictor", "forward"),
        ("predictor", "forward_backward"),
    ],
)
def test_attention(
    measure: Callable[..., None],
    workload: Workload,
    device: torch.device,
    part: str,
    mode: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = workload.masks(device)
    width, heads = workload.width, workload.num_heads
    if part == "target":
        packing = Packing.uniform(workload.batch_size, masks.num_tokens, device)
    elif part == "context":
        packing = Packing(masks.context_lengths, masks.cu_seqlens_context)
    else:
        packing = Packing(masks.total_lengths, masks.cu_seqlens)
        model = workload.config.model
        assert model.pred_num_heads is not None
        width, heads = model.pred_embed_dim, model.pred_num_heads
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    where = packing.cu_seqlens.device
    case = choice.Case(where, workload.torch_dtype, width // heads, heads, mode != "forward", deterministic=False)
    why = choice.refusals(case)[backend]
    if why is not None:
        pytest.skip(why)
    qkv = randn(packing.total, 3 * width, device=device, dtype=workload.torch_dtype, grad=mode != "forward")
    grad = randn(packing.total, width, device=device, dtype=workload.torch_dtype)

    def forward() -> torch.Tensor:
        return attention(qkv, packing, heads, backend)

    def forward_backward() -> None:
        qkv.grad = None
        forward().backward(grad)

    work = flops.attention(packing.lengths, width)
    if mode == "forward":
        measure(forward, num_bytes=qkv.nbytes + grad.nbytes, flops=work)
    else:
        # The backward recomputes the scores: five products instead of two. It reads qkv, the output and its gradient.
        measure(forward_backward, num_bytes=3 * qkv.nbytes + 3 * grad.nbytes, flops=3.5 * work)
