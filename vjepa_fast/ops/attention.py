"""Self-attention over packed sequences: every sequence attends to itself only.

Neighbouring sequences of one length form a dense batch, so a buffer with R distinct runs costs R calls of
scaled_dot_product_attention and no padding. FLOPs forward: 4 * sum(length^2) * H * D; backward 2.5 times that.

Legend: L tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.ops.packing import Packing


def attention(qkv: Tensor, packing: Packing, num_heads: int) -> Tensor:
    """Softmax attention with scale head_dim ** -0.5.

    Args:
        qkv: [L, 3 * H * D], the output of one projection: queries, keys, values, each head by head.
        packing: where the sequences lie.
        num_heads: H.

    Returns:
        [L, H * D].
    """
    width = qkv.shape[-1] // 3
    parts = qkv.split([count * length for count, length in packing.runs]) if len(packing.runs) > 1 else (qkv,)
    outputs = []
    for part, (count, length) in zip(parts, packing.runs, strict=True):
        q, k, v = part.view(count, length, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        outputs.append(out.transpose(1, 2).reshape(count * length, width))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
