"""Layer norm with fp32 statistics and affine parameters for inputs of any precision.

Legend: L tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that computes in the precision of its parameters and returns the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        wide = F.layer_norm(
            input.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return wide.to(input.dtype)


def target_norm(x: Tensor) -> Tensor:
    """Parameter-free layer norm of target features, [L, D], eps 1e-5, at least fp32.

    Reference: facebookresearch/vjepa2, app/vjepa/train.py:432.
    """
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (x.shape[-1],))
