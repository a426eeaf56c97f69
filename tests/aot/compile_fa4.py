"""Compiles FlashAttention 4's kernels for sm_90a through our adapter and prints, as JSON, the seconds it took.

Needs flash-attn-4, but no GPU: the tensors are fake. A process of its own, as the library reads these variables when
it is imported.

    python tests/aot/compile_fa4.py HEAD_DIM
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {
    "FLASH_ATTENTION_ARCH": "sm_90",
    "CUTE_DSL_ARCH": "sm_90a",
    "FLASH_ATTENTION_NUM_SMS": "132",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
}

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from vjepa_fast.ops.attention.backends import BACKENDS, adapter  # noqa: E402
from vjepa_fast.ops.attention.choice import _CHECKED_LENGTHS  # noqa: E402


def main(head_dim: int) -> None:
    """Forward, and backward where the table has one; then both for other longest sequences, which are no new kernels.

    The shortest is that of the check of a back end: what it compiles is what training runs.
    """
    calls = adapter("fa4")
    assert not isinstance(calls, str), calls
    from flash_attn.cute import interface

    compiled = 0
    real = interface.cute.compile

    def counted(*args, **kwargs):
        nonlocal compiled
        compiled += 1
        return real(*args, **kwargs)

    interface.cute.compile = counted
    heads = 12 if head_dim == 32 else 16
    seconds: dict[str, float] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = torch.empty(4096, 3 * heads * head_dim, dtype=torch.bfloat16, device="cuda:0")
        cu_seqlens = torch.empty(49, dtype=torch.int32, device="cuda:0")
        q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
        gradients = torch.empty_like(qkv).view(len(qkv), 3, heads, -1).unbind(1)
        for longest in (1530, 997, max(_CHECKED_LENGTHS)):
            before = compiled
            began = time.perf_counter()
            out, lse = calls.forward(q, k, v, cu_seqlens, longest, head_dim**-0.5)
            assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
            assert lse.shape == (heads, len(qkv)) and lse.dtype == torch.float32
            seconds.setdefault("forward", time.perf_counter() - began)
            if (9, head_dim) not in BACKENDS["fa4"].no_backward:
                began = time.perf_counter()
                calls.backward(
                    torch.empty_like(out), q, k, v, out, lse, cu_seqlens, longest, head_dim**-0.5, *gradients, False
                )
                seconds.setdefault("backward", time.perf_counter() - began)
            assert longest == 1530 or compiled == before, "another max_seqlen compiles again"
    assert compiled
    print(json.dumps({"head_dim": head_dim, "seconds": seconds, "compiled": compiled}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
