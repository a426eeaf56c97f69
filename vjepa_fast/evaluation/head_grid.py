"""Trains a grid of attentive probes, one per learning rate and weight decay, in one batched pass.

Every parameter is one tensor [K, ...] over the K heads, so that a product over all heads is one batched product, and no
head sees another: the gradients are those of K separate probes.

The cross-attention has one query, which does not depend on the clip. So keys and values are never made: with the key
matrix W of an attention head, q . (W x) = (W^T q) . x, and the weighted mean of values is the value matrix times the
weighted mean of x. A pass over N tokens costs 2 N D H multiply-adds in place of 2 N D^2 (H attention heads; D is 64 H
in ViT-L), and depth 1 reads the tokens once for all heads together. The bias of the keys adds the same to every token's
score, which softmax takes away: its gradient is exactly zero here, and rounding noise in the reference.

Legend: K heads, B clips, N tokens of a clip, D width, H attention heads, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vjepa_fast.models.attentive import EPS, AttentiveClassifier

_POOLER = "pooler."
_CROSS = "pooler.cross_attention_block."
_TOGETHER = {"cuda": 2**28, "cpu": 2**25}
"""Numbers in the input of a block: about twenty times as many are in memory for its backward pass."""


class HeadGrid:
    """K attentive probes.

    Args:
        states: state dict of each, of one shape (vjepa_fast.models.attentive.AttentiveClassifier).
        num_heads: H.

    Attributes:
        parameters: by the name in the state dict, fp32 [K, ...].
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], num_heads: int) -> None:
        self.num_heads = num_heads
        self.parameters = {
            name: torch.stack([state[name].detach() for state in states]).requires_grad_() for name in states[0]
        }
        self.depth = 1 + sum(name.endswith("attn.qkv.weight") for name in self.parameters)

    @classmethod
    def start(cls, count: int, dim: int, num_heads: int, num_outputs: int, depth: int, seed: int) -> HeadGrid:
        """K probes that begin differently, as the reference's do.

        Raises:
            ConfigError: `num_heads` does not divide `dim`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(
                [AttentiveClassifier(dim, num_heads, num_outputs, depth).state_dict() for _ in range(count)], num_heads
            )

    def __len__(self) -> int:
        return len(self.parameters["linear.bias"])

    def samples_together(self, num_tokens: int, device: torch.device) -> int:
        """Samples whose activations fit into a few GiB, at least 1, by a rule of thumb."""
        copies = len(self) if self.depth > 1 else 1
        dim = self.parameters["linear.weight"].shape[-1]
        return max(1, _TOGETHER["cuda" if device.type == "cuda" else "cpu"] // (copies * num_tokens * dim))

    def to(self, device: torch.device) -> HeadGrid:
        """Moves the parameters."""
        self.parameters = {name: value.detach().to(device).requires_grad_() for name, value in self.parameters.items()}
        return self

    def state_dict(self, head: int) -> dict[str, Tensor]:
        """Of one head, on the CPU, with the reference's names."""
        return {name: value[head].detach().cpu().clone() for name, value in self.parameters.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [K, B, C], fp32 at least, from features [B, N, D]; products are of the dtype of x."""
        weights = {name: value.to(x.dtype) for name, value in self.parameters.items()}
        shape = (x.shape[0], x.shape[1])
        hidden = x.flatten(0, 1)[None]
        for number in range(self.depth - 1):
            prefix = f"{_POOLER}blocks.{number}."
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            # Of a block only its input is kept for the backward pass, as in the reference.
            if torch.is_grad_enabled():
                hidden = checkpoint(self._block, hidden, own, shape, use_reentrant=False)
            else:
                hidden = self._block(hidden, own, shape)
        own = {name.removeprefix(_CROSS): value for name, value in weights.items() if name.startswith(_CROSS)}
        pooled = self._pool(hidden, weights[f"{_POOLER}query_tokens"][:, 0], own, shape)
        return _wide(_linear(pooled, weights, "linear"))

    def _block(self, x: Tensor, own: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """[K, B * N, D] from x of that shape, or [1, B * N, D]."""
        qkv = _linear(_norm(x, own, "norm1"), own, "attn.qkv")
        split = qkv.view(len(self), *shape, 3, self.num_heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
        mixed = mixed.transpose(1, 2).reshape(len(self), shape[0] * shape[1], -1)
        x = x + _linear(mixed, own, "attn.proj")
        return x + _mlp(x, own)

    def _pool(self, x: Tensor, query: Tensor, own: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """[K, B, D] from x [K or 1, B * N, D] and query [K, 1, D]."""
        heads, (num_clips, num_tokens), dim = self.num_heads, shape, x.shape[-1]
        q = _linear(query, own, "xattn.q").view(len(self), heads, 1, -1)
        keys, values = own["xattn.kv.weight"].view(len(self), 2, heads, dim // heads, dim).unbind(1)
        _, value_bias = own["xattn.kv.bias"].view(len(self), 2, dim).unbind(1)
        scale, shift = own["norm1.weight"], own["norm1.bias"]
        # [K, H, D]: what a normed token is multiplied with for its score.
        probe = (q @ keys).squeeze(2) * scale[:, None] * (dim // heads) ** -0.5
        normed = F.layer_norm(x, (dim,), eps=EPS)
        if len(x) == 1:
            scores = (normed[0] @ probe.flatten(0, 1).T).view(num_clips, num_tokens, len(self) * heads)
            share = _wide(scores).softmax(1).to(x.dtype)
            mean = share.transpose(1, 2) @ normed.view(num_clips, num_tokens, dim)
            mean = mean.view(num_clips, len(self), heads, dim).transpose(0, 1)
        else:
            scores = (normed @ probe.transpose(1, 2)).view(len(self), num_clips, num_tokens, heads)
            share = _wide(scores).softmax(2).to(x.dtype)
            mean = share.transpose(2, 3) @ normed.view(len(self), num_clips, num_tokens, dim)
        # [K, B, H, D] -> [K, H, B, D / H]
        mean = (mean * scale[:, None, None] + shift[:, None, None]).transpose(1, 2)
        mixed = (mean @ values.transpose(2, 3)).transpose(1, 2).reshape(len(self), num_clips, dim)
        pooled = query + mixed + value_bias[:, None]
        return pooled + _mlp(pooled, own)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _norm(x: Tensor, own: Mapping[str, Tensor], name: str) -> Tensor:
    """[K, M, D] from x [K or 1, M, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * own[f"{name}.weight"][:, None] + own[f"{name}.bias"][:, None]


def _linear(x: Tensor, own: Mapping[str, Tensor], name: str) -> Tensor:
    """[K, M, out] from x [K, M, in]."""
    return torch.baddbmm(own[f"{name}.bias"][:, None], x, own[f"{name}.weight"].transpose(1, 2))


def _mlp(x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    return _linear(F.gelu(_linear(_norm(x, own, "norm2"), own, "mlp.fc1")), own, "mlp.fc2")
