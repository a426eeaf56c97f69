"""Swaps live modules of Meta's V-JEPA 2.1 (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1).

Legend: B clips, K context tokens, K' target tokens, D width; L depths whose features stand side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.models.sizes import level_blocks
from vjepa_fast.swapping.meta import FastEncoder, FastWrapper, refuse
from vjepa_fast.swapping.meta_predictor import FastPredictorBase, by_group, by_pair
from vjepa_fast.swapping.shared_parameters import is_watched


def _options(module: Any, blocks: nn.ModuleList) -> dict[str, Any]:
    """What encoder and predictor share of 2.1's keys of ModelConfig.

    Raises:
        UserError: options that ours do not have.
    """
    refuse(module, set() if module.use_rope else {"use_rope=false"})
    attention: Any = blocks[0].attn
    wrong = {
        f"{name}={getattr(attention, name)}" for name in ("n_registers", "has_cls_first") if getattr(attention, name)
    }
    refuse(module, wrong)
    return {
        "rope_style": "interleaved",
        "interpolate_rope": attention.interpolate_rope,
        "modality_embedding": module.modality_embedding,
    }


class FastEncoderV21(FastEncoder):
    """Before VisionTransformer."""

    def options(self) -> dict[str, Any]:
        module: Any = self
        depths, chosen = list(module.hierarchical_layers), list(module.out_layers_distillation)
        wrong = set()
        if depths != list(level_blocks(len(module.blocks))) or chosen not in (depths, depths[-1:]):
            wrong.add(f"hierarchical_layers={depths} with out_layers_distillation={chosen}")
        if module.modality_embedding and module.img_temporal_dim_size is None:
            wrong.add("modality embeddings without img_temporal_dim_size")
        refuse(self, wrong)
        return {
            **_options(module, module.blocks),
            "n_output_distillation": len(chosen),
            "img_temporal_dim_size": module.img_temporal_dim_size,
        }

    @torch.compiler.disable
    def forward(self, x: Tensor, masks: Tensor | list[Tensor] | None = None, training: bool = False) -> Any:
        """As the reference's: [B, N, D], or [M * B, K, D] with M masks; L D in place of D with `training` or
        return_hierarchical; a list with `out_layers`."""
        every_level = bool(training or self.return_hierarchical)
        network = self.ready([x], self._compiled_call_impl is not None, every_level)
        if network is None:
            return super(FastEncoder, self).forward(x, masks, training)
        with network.casting(x.device):
            return network(x, masks, every_level)


class FastPredictorV21(FastPredictorBase):
    """Before VisionTransformerPredictor."""

    def check(self) -> None:
        module: Any = self
        wrong = {"chop_last_n_tokens"} if module.chop_last_n_tokens else set()
        if module.mask_tokens is None:
            wrong.add("use_mask_tokens=false")
        if len(module.hierarchical_layers) not in (1, 4):
            wrong.add(f"features of {len(module.hierarchical_layers)} depths")
        embed = module.predictor_embed
        silu = hasattr(module.predictor_blocks[0].mlp, "fc3")
        if isinstance(embed, nn.Sequential) and not isinstance(embed[1], nn.SiLU if silu else nn.GELU):
            wrong.add(f"{embed[1]} in its embedding")
        refuse(self, wrong)

    def widths(self) -> tuple[int, int]:
        several = isinstance(self.predictor_embed, nn.Sequential)
        width, embed_dim = self.get_parameter(f"predictor_embed.{'2.' if several else ''}weight").shape
        return width, embed_dim

    def options(self) -> dict[str, Any]:
        module: Any = self
        shared = _options(module, module.predictor_blocks)
        return {
            **shared,
            "n_output_distillation": len(module.hierarchical_layers),
            "teacher_embed_dim": module.predictor_proj.weight.shape[0],
            "return_all_tokens": module.return_all_tokens,
            # Told by the argument `mod`, not by the number of frames.
            "img_temporal_dim_size": 1 if shared["modality_embedding"] else None,
        }

    @torch.compiler.disable
    def forward(self, x: Tensor, masks_x: Any, masks_y: Any, mod: str = "video", mask_index: int = 1) -> Any:
        """Args: x: [B, K, L D]; masks_x, masks_y: int64 [B, K] and [B, K'], or lists of one.

        Returns predictions for the tokens to predict, [B, K', L D], and for the context, [B, K, L D] or None.
        """
        lists = [m if isinstance(m, list) else [m] for m in (masks_x, masks_y)]
        found = None
        if len(lists[0]) == len(lists[1]) == 1:
            row = mask_index, x, lists[0][0], lists[1][0]
            found = self.predict([row], self._compiled_call_impl is not None, None, mod == "image")
        if found is None:
            return super().forward(x, masks_x, masks_y, mod, mask_index)
        return found.targets[0], None if found.contexts is None else found.contexts[0]


class FastMultiSeqV21(FastWrapper):
    """Before MultiSeqWrapper: lists over frames-per-clip groups, and over masks within."""

    @torch.compiler.disable
    def forward(self, x: Any, masks: Any = None, gram_mode: bool = False, training_mode: bool = False) -> Any:
        """For each group [B, N, D]; with masks for each group and mask [B, K, D]; L D with `training_mode`."""
        found = None
        if isinstance(self.backbone, FastEncoderV21) and isinstance(x, list | tuple) and not gram_mode:
            every_level = bool(training_mode or self.backbone.return_hierarchical)
            found = self.backbone.encode(x, masks, self.compiled, every_level)
        if found is None:
            return super().forward(x, masks, gram_mode, training_mode)
        return [group[0] for group in found] if masks is None else found


class FastPredictorMultiSeqV21(FastWrapper):
    """Before PredictorMultiSeqWrapper; the masks of a group share a mask token."""

    @torch.compiler.disable
    def forward(self, x: Any, masks_x: Any, masks_y: Any, mod: str = "video") -> Any:
        """For each group and mask [B, K', L D], and again for each [B, K, L D] or None."""
        found = None
        if isinstance(self.backbone, FastPredictorV21) and not is_watched(self.backbone):
            rows = by_pair(x, masks_x, masks_y)
            found = self.backbone.predict(rows, self.compiled, None, mod == "image")
        if found is None:
            return super().forward(x, masks_x, masks_y, mod)
        contexts: Any = [None] * len(rows) if found.contexts is None else found.contexts
        return by_group(found.targets, rows, len(x)), by_group(contexts, rows, len(x))
