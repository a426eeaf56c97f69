"""V-JEPA 2.1's own modules (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1), run at our sizes.

What its training script does between them
(app/vjepa_2_1/train.py, train_step) is written out here, as it cannot be imported by itself.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vjepa_fast.bench.reference import normalise

from . import reference
from .cases import OPTIMIZATION, Batch
from .cases_v21 import IMAGE_SHARE, LAMBDA, RAMP, DenseCase
from .reference import Checkout, Triple

CHECKOUT = Checkout("VJEPA21_REFERENCE", "facebookresearch/vjepa2", "204698b", part="app/vjepa_2_1")
needs_reference = CHECKOUT.needed

_MODULES = {
    "vit": "app.vjepa_2_1.models.vision_transformer",
    "predictor": "app.vjepa_2_1.models.predictor",
    "wrappers": "app.vjepa_2_1.wrappers",
    "distances": "app.vjepa_2_1.models.utils.masks_dist",
    "blocks": "app.vjepa_2_1.models.utils.modules",
    "utils": "app.vjepa_2_1.utils",
    "mask_utils": "src.masks.utils",
}


@functools.cache
def modules() -> types.SimpleNamespace:
    """The reference's modules; one imports torchvision and makes no use of it."""
    return CHECKOUT.load(_MODULES, {"torchvision": types.ModuleType("torchvision")})


def build(case: DenseCase, dtype: torch.dtype = torch.float32) -> Triple:
    """The three modules of `case` with the reference's own initialisation (torch's global seed)."""
    shared: dict[str, Any] = {
        "img_size": case.crop_size,
        "patch_size": case.patch_size,
        "num_frames": 8,
        "tubelet_size": case.tubelet_size,
        "use_rope": True,
        "wide_silu": case.wide_silu,
        "use_sdpa": True,
        "mlp_ratio": 4.0,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
        "img_temporal_dim_size": 1,
        "interpolate_rope": True,
        "modality_embedding": True,
    }
    wrappers = modules().wrappers
    encoder = wrappers.MultiSeqWrapper(
        modules().vit.VisionTransformer(
            embed_dim=case.embed_dim, depth=case.depth, num_heads=case.num_heads, use_silu=case.use_silu, **shared
        )
    )
    predictor = wrappers.PredictorMultiSeqWrapper(
        modules().predictor.VisionTransformerPredictor(
            embed_dim=case.embed_dim,
            predictor_embed_dim=case.pred_embed_dim,
            depth=case.pred_depth,
            num_heads=case.pred_num_heads,
            use_silu=case.use_pred_silu,
            use_mask_tokens=True,
            num_mask_tokens=case.num_mask_tokens,
            return_all_tokens=True,
            **shared,
        )
    )
    triple = Triple(encoder.to(dtype), predictor.to(dtype), copy.deepcopy(encoder))
    triple.target_encoder.requires_grad_(False)
    return triple


class Training(reference.Training):
    """The reference's step."""

    def __init__(self, triple: Triple, case: DenseCase) -> None:
        super().__init__(triple, case, functools.partial(modules().utils.init_opt, is_anneal=False))
        self.momenta = (min(momentum, OPTIMIZATION["ema"][1]) for momentum in self.momenta)
        self.ramp = modules().blocks.Lambda_LinearWarmupHold(LAMBDA, *RAMP)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """The loss of one batch and its margin; a group is what one process of theirs has."""
        shares = [1.0]
        if len(batch.clips) == 2:
            shares = [1 - IMAGE_SHARE, IMAGE_SHARE]
        total: Any = 0.0
        margin = float("inf")
        for group, share in enumerate(shares):
            one = Batch(*([values[group]] for values in (batch.clips, batch.masks_enc, batch.masks_pred, batch.grids)))
            loss, own = self._group_loss(one)
            total, margin = total + share * loss, min(margin, own)
        return total, margin

    def _group_loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        triple, case, margins = self.triple, self.case, []
        assert isinstance(case, DenseCase)
        clips = [normalise(clip, next(triple.encoder.parameters()).dtype) for clip in batch.clips]
        width = case.embed_dim
        with torch.no_grad():
            (whole,) = triple.target_encoder(clips, training_mode=True)
            target = torch.cat([F.layer_norm(part, (width,)) for part in whole.split(width, dim=2)], dim=2)
        context = triple.encoder(clips, batch.masks_enc, training_mode=True)
        modality = "image" if clips[0].shape[2] == 1 else "video"
        predicted, of_context = triple.predictor(context, batch.masks_enc, batch.masks_pred, mod=modality)

        def mean(found: list[torch.Tensor], masks: list[torch.Tensor], distances: Any) -> torch.Tensor:
            terms = []
            chosen = modules().mask_utils.apply_masks(target, masks, concat=False)
            for i, (one, wanted) in enumerate(zip(found, chosen, strict=True)):
                difference = (one - wanted).abs()
                margins.append(difference.min().item())
                difference = difference**case.loss_exp
                if distances is not None:
                    difference = difference * (1 / distances[i].unsqueeze(2))
                terms.append(difference.mean() / case.loss_exp)
            return torch.stack(terms).mean()

        distances = None
        if case.weight_distance_loss:
            (distances,) = modules().distances.compute_mask_distance(
                batch.masks_pred, batch.masks_enc, case.crop_size // case.patch_size, case.offset_context_loss
            )
        loss = mean(predicted[0], batch.masks_pred[0], None)
        loss = loss + mean(of_context[0], batch.masks_enc[0], distances) * self.ramp.value(self.count)
        return loss, min(margins)
