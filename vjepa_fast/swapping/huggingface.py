"""Swaps live modules of Hugging Face transformers (models/vjepa2).

Theirs keep query, key and value apart; ours joins them, under autograd, at every call. Calls that ask for hidden states
or attentions run their own layers, as hooks on these record them.

Legend: B clips, T frames, N tokens of a clip, K context tokens, K' target tokens, D width.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.checkpoints.huggingface.weights import BLOCK, ENCODER, PREDICTOR, QKV
from vjepa_fast.models.layers import Block
from vjepa_fast.ops.linear import Affine, Linear, linear_by, operands
from vjepa_fast.ops.packing import Packing
from vjepa_fast.swapping.meta import copy_drop_paths, refuse
from vjepa_fast.swapping.shared_parameters import (
    EncoderView,
    FastNetwork,
    PredictorView,
    View,
    class_of,
    config_of,
    is_plain,
    pack,
    square_grid,
)


class _JoinedLinear(Linear):
    """One layer in place of three that have the same input and stay where they are."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        nn.Module.__init__(self)
        self.parts = tuple(parts)

    def operands(self, dtype: torch.dtype) -> Affine:
        weights: list[Tensor] = [part.weight for part in self.parts]
        biases: list[Tensor] = [part.bias for part in self.parts if part.bias is not None]
        return operands(torch.cat(weights), torch.cat(biases) if biases else None, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return linear_by(input, self.operands(input.dtype))


class _HFEncoderView(EncoderView):
    def encode(self, clips: Tensor, side: int) -> Tensor:
        """[B, N, D] of [B, T, H, W, 3]; tokens have the positions that they would have in frames of side^2 tokens."""
        grid, batch_size = self.grid_of(clips), len(clips)
        num_tokens = grid[0] * grid[1] * grid[2]
        ids = torch.arange(num_tokens, dtype=torch.int32, device=clips.device).repeat(batch_size)
        packing = Packing.uniform(batch_size, num_tokens, clips.device)
        places = -(-num_tokens // side**2), side, side
        [out] = self._run(self._embed(clips, None, grid), ids, places, packing, self.levels)
        return out.view(batch_size, num_tokens, -1)


class _FastHF(FastNetwork):
    """Of encoder and predictor."""

    layer: nn.ModuleList
    config: Any

    def _sizes(self) -> dict[str, Any]:
        config, layers = self.config, self.layer
        wrong = set()
        if config.attention_probs_dropout_prob > 0:
            wrong.add(f"attention_probs_dropout_prob={config.attention_probs_dropout_prob:g}")
        if config.hidden_act != "gelu":
            wrong.add(f"hidden_act={config.hidden_act}")
        if config.in_chans != 3:
            wrong.add(f"in_chans={config.in_chans}")
        refuse(self, wrong)
        layer: Any = layers[0]
        return {
            "model_name": "vit_tiny",
            "crop_size": config.crop_size,
            "num_frames": max(2, config.frames_per_clip),
            "patch_size": config.patch_size,
            "tubelet_size": config.tubelet_size,
            "wide_silu": False,
            "rope_precision": "reference",
            "mlp_ratio": layer.mlp.fc1.weight.shape[0] / layer.hidden_size,
        }

    def _view(self, network: Any, blocks: nn.ModuleList, outer: dict[str, str], path: str) -> View:
        names = dict(outer)
        for index, (block, layer) in enumerate(zip(blocks, self.layer, strict=True)):
            assert isinstance(block, Block)
            attention: Any = layer.attention
            parts = [getattr(attention, name) for name in QKV]
            refuse(self, {f"a {type(part).__name__} for query, key or value" for part in parts if not is_plain(part)})
            block.attn.qkv = _JoinedLinear(parts)
            names |= {f"{path}.{index}.{mine}": f"layer.{index}.{other}" for mine, other in BLOCK.items()}
        copy_drop_paths(blocks, self.layer)
        return View(self, network, names)

    def _network(self, options: dict[str, Any]) -> Any:
        """The network for a call with these arguments beside its inputs; None: theirs has to run."""
        asked = [name for name, value in options.items() if name != "return_dict" and _is_set(value)]
        if asked:
            self._warn(f"it is called with {', '.join(asked)}")
            return None
        view = self.serves()
        if view is None:
            return None
        layers: list[Any] = list(self.layer)
        checkpointing = self.training and any(layer.gradient_checkpointing for layer in layers)
        view.refresh(layers, checkpointing, self._compiled_call_impl is not None)
        return view.network

    @staticmethod
    def is_inactive(hook: Any) -> bool:
        """A recorder stays on a layer for good, and records while a call asks for it."""
        module = sys.modules.get("transformers.utils.output_capturing")
        return (
            module is not None
            and getattr(hook, "__module__", None) == module.__name__
            and not (module._active_collector.get())
        )

    def _output(self, last_hidden_state: Tensor) -> Any:
        # The name is in the module of their class, which imports it.
        return sys.modules[class_of(self).__module__].BaseModelOutput(last_hidden_state=last_hidden_state)


def _is_set(value: Any) -> bool:
    """Older versions hand on lists of masks for heads, which may all be None."""
    return any(map(_is_set, value)) if isinstance(value, list) else value is not None and value is not False


class FastHFEncoder(_FastHF):
    """Before VJEPA2Encoder."""

    def make_view(self) -> View:
        config = self.config
        cfg = config_of(
            self,
            **self._sizes(),
            embed_dim=config.hidden_size,
            depth=len(self.layer),
            num_heads=config.num_attention_heads,
        )
        with torch.device("meta"):
            network = _HFEncoderView(cfg)
        return self._view(network, network.blocks, ENCODER, "blocks")

    @torch.compiler.disable
    def forward(self, pixel_values_videos: Tensor | None = None, **kwargs: Any) -> Any:
        """Args: pixel_values_videos: [B, T, 3, H, W]. Returns BaseModelOutput with [B, N, D]."""
        is_clip = pixel_values_videos is not None and pixel_values_videos.ndim == 5
        network = self._network(kwargs) if is_clip else None
        if network is None or pixel_values_videos is None:
            return super().forward(pixel_values_videos, **kwargs)
        x, config = pixel_values_videos, self.config
        if x.shape[1] < config.tubelet_size:
            x = x.repeat(1, config.tubelet_size, 1, 1, 1)
        if x.shape[1] % config.tubelet_size or any(side % config.patch_size for side in x.shape[-2:]):
            # Theirs leaves out what is over.
            return super().forward(pixel_values_videos, **kwargs)
        with network.casting(x.device):
            clips = x.to(network.patch_embed.proj.weight.dtype).permute(0, 1, 3, 4, 2)
            return self._output(network.encode(clips, config.crop_size // config.patch_size))


class FastHFPredictor(_FastHF):
    """Before VJEPA2Predictor."""

    embeddings: nn.Module

    def make_view(self) -> View:
        config = self.config
        cfg = config_of(
            self,
            **self._sizes(),
            embed_dim=config.hidden_size,
            num_heads=1,
            pred_embed_dim=config.pred_hidden_size,
            pred_depth=len(self.layer),
            pred_num_heads=config.pred_num_attention_heads,
        )
        with torch.device("meta"):
            network = PredictorView(cfg)
        # Theirs has all mask tokens in one parameter, which takes the place of the list at every call.
        del network.mask_tokens
        return self._view(network, network.predictor_blocks, PREDICTOR, "predictor_blocks")

    @torch.compiler.disable
    def forward(
        self, encoder_hidden_states: Tensor, context_mask: list[Tensor], target_mask: list[Tensor], **kwargs: Any
    ) -> Any:
        """Args: encoder_hidden_states: [B, N, D]; the masks: lists of one, int64 [B, K] and [B, K'].

        Returns BaseModelOutput with [B, K', D].
        """
        network = self._network(kwargs) if len(context_mask) == len(target_mask) == 1 else None
        if network is None:
            return super().forward(encoder_hidden_states, context_mask, target_mask, **kwargs)
        x, config = encoder_hidden_states, self.config
        (context,), (target,) = ([ids.to(x.device) for ids in masks] for masks in (context_mask, target_mask))
        object.__setattr__(network, "mask_tokens", self.embeddings.mask_tokens)
        side = config.crop_size // config.patch_size
        grid = square_grid([context, target], x.shape[1], side)
        with network.casting(x.device):
            seen = x.gather(1, context[..., None].expand(-1, -1, x.shape[-1]))
            masks = pack([context], [target], grid)
            # Theirs always begins with mask token 1.
            out = network.forward_packed(seen.flatten(0, 1), [masks], [1])
            return self._output(out.view(*target.shape, -1))
