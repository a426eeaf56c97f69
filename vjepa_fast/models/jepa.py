"""V-JEPA: context encoder, predictor and EMA target encoder with the training loss.

Legend: B clips, T frames, K predicted tokens, D encoder width, or in V-JEPA 2.1 that of all levels side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.common.profiler_labels import label, label_backward
from vjepa_fast.config.schema import Config, ModelConfig
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.context_weights import context_weights
from vjepa_fast.models.pixels import CHANNELS, pixel_tubelets
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.ops import fp8_linear
from vjepa_fast.ops.latent_loss import FinalNorm, latent_loss, target_features
from vjepa_fast.ops.linear import Linear
from vjepa_fast.ops.variance_loss import variance_loss

OFFSET_SIDE = 16
"""Rows of tokens to which LossConfig.offset_context_loss relates distances (2.1's masks_dist.py)."""


@dataclass
class JEPAOutput:
    """Result of a forward pass in training."""

    loss: Tensor
    """Scalar."""
    packed_predictions: Tensor
    """[sum of target lengths, D], group by group, mask by mask, clip by clip."""
    features: Tensor
    """[tokens of all clips, D]: output of the target encoder's last block, or with cfg.objective=pixels the pixels."""
    target_rows: Tensor
    """int64 [sum of target lengths]: the row of `features` that each prediction is of."""
    final_norm: FinalNorm | None
    """A copy of the target encoder's last norm, which the loss applies to those rows; of several, side by side. None:
    pixels have none."""
    masks: list[MaskBatch]
    context: Tensor
    """[sum of context lengths, D]: what the context encoder gave to the predictor, detached."""
    levels: int = 1
    """How many depths of the encoder, or colour channels, D is made of."""
    context_levels: int = 1
    """How many depths the context's features are made of."""

    @property
    def packed_targets(self) -> Tensor:
        """As packed_predictions, fp32 or fp64: layer-normed features of the target encoder.

        Made when asked for: the loss does not store them.
        """
        with torch.no_grad():
            return target_features(self.features, self.target_rows, self.final_norm, self.levels)

    @property
    def predictions(self) -> list[list[Tensor]]:
        """For each group and mask [B, K, D]; needs masks of one length (`truncate: batch_min`)."""
        return self._unpack(self.packed_predictions)

    @property
    def targets(self) -> list[list[Tensor]]:
        """As `predictions`."""
        return self._unpack(self.packed_targets)

    def _unpack(self, packed: Tensor) -> list[list[Tensor]]:
        for m in self.masks:
            # One row of lengths a mask; they must agree for a dense tensor to exist.
            rows = [m.target_lengths[i :: m.batch_size] for i in range(m.batch_size)]
            if len(set(rows)) > 1:
                raise ValueError(
                    "clips of one mask differ in length (truncate: none); read packed_predictions and "
                    "packed_targets instead"
                )
        groups = packed.split([len(m.target_ids) for m in self.masks])
        return [
            [
                ids_of_mask.view(m.batch_size, -1, packed.shape[-1])
                for ids_of_mask in group[: sum(m.target_lengths)].split(_mask_totals(m))
            ]
            for group, m in zip(groups, self.masks, strict=True)
        ]


def _rows_of_batches(masks: Sequence[MaskBatch], name: str) -> Tensor:
    """context_rows or target_rows of all groups, in the buffer that holds the clips of one after those of another."""
    rows, offset = [], 0
    for batch in masks:
        rows.append(getattr(batch, name) + offset)
        offset += batch.batch_size * batch.num_tokens
    return torch.cat(rows)


def _mask_totals(masks: MaskBatch) -> list[int]:
    b = masks.batch_size
    return [sum(masks.target_lengths[i * b : (i + 1) * b]) for i in range(masks.num_masks)]


class VJEPA(nn.Module):
    """The three networks of V-JEPA pretraining.

    Attributes:
        encoder: VisionTransformer, trained.
        predictor: Predictor, trained.
        target_encoder: a copy of the encoder that no gradient reaches; an optimizer or an EMA moves it.
        context_scale: float64 [2], weights of the context tokens' loss of videos and of images; there where the
            predictor has a head for them (cfg.return_all_tokens). A schedule fills it in place, so that a captured
            CUDA graph reads the new weights at each replay. It is not saved.

    `from_config` builds one with the loss that a config asks for; the arguments here are for models without a config.

    Args:
        cfg: crop_size, num_frames, patch_size and tubelet_size must be set (a loaded config has them).
        loss_exp: p of the L_p loss.
        reg_coeff: weight of V-JEPA 1's variance term; 0 leaves it out.
        prediction_l2: weight of half the mean square of the predictions; 0 leaves it out.
        weight_distance_loss, offset_context_loss: as in LossConfig.
        context_scale: lambda_value_vid and lambda_value_img, what `context_scale` begins with.
    """

    context_scale: Tensor

    def __init__(
        self,
        cfg: ModelConfig,
        loss_exp: float = 1.0,
        reg_coeff: float = 0.0,
        weight_distance_loss: bool = False,
        offset_context_loss: bool = False,
        prediction_l2: float = 0.0,
        context_scale: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.loss_exp = loss_exp
        self.reg_coeff = reg_coeff
        self.prediction_l2 = prediction_l2
        self.weight_distance_loss, self.offset_context_loss = weight_distance_loss, offset_context_loss
        self.encoder = VisionTransformer(cfg)
        self.predictor = Predictor(cfg)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        if cfg.return_all_tokens:
            # A schedule in steps is exact in float64 alone; the loss takes it to its own precision.
            self.register_buffer("context_scale", torch.tensor(context_scale, dtype=torch.float64), persistent=False)
        if cfg.target_precision == "float8":
            for layer in self.target_encoder.blocks.modules():
                if isinstance(layer, Linear):
                    layer.float8 = fp8_linear.serves(layer.weight)

    @classmethod
    def from_config(cls, cfg: Config) -> VJEPA:
        """The model of a config, freshly initialised, with the loss of its section `loss`."""
        return cls(cfg.model, **cfg.loss.model_options())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VJEPA:
        # What casts or moves a module goes through here. The schedule's weights move, but stay in float64; Apple's GPUs
        # have no float64, and take a scalar from the CPU.
        scale = self._buffers.pop("context_scale", None)
        super()._apply(fn, recurse)
        if scale is not None:
            device = next(self.parameters()).device
            device = torch.device("cpu") if device.type == "mps" else device
            moved = torch.empty(2, dtype=torch.float64, device=device) if scale.is_meta else scale.to(device)
            self._buffers["context_scale"] = moved
        return self

    @property
    def loss_options(self) -> dict[str, Any]:
        """The arguments that decide the loss, but for `context_scale`, which moves: `VJEPA(cfg, **loss_options)`."""
        return {
            "loss_exp": self.loss_exp,
            "reg_coeff": self.reg_coeff,
            "weight_distance_loss": self.weight_distance_loss,
            "offset_context_loss": self.offset_context_loss,
            "prediction_l2": self.prediction_l2,
        }

    def forward(self, clips: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]) -> JEPAOutput:
        """One packed pass of context encoder and predictor for all masks, and the loss.

        Args:
            clips: uint8 [B, T, H, W, 3], or a list with one entry a frames-per-clip group; see
                VisionTransformer.to_clips for the other layouts.
            masks: for each group, on the device of the clips.

        Raises:
            ValueError: clips and masks that do not belong together.
        """
        groups = [clips] if isinstance(clips, Tensor) else list(clips)
        batches = [masks] if isinstance(masks, MaskBatch) else list(masks)
        if len(groups) != len(batches) or not groups:
            raise ValueError(f"{len(groups)} groups of clips but {len(batches)} of masks; expected one each")
        if len(batches) > 1 and any(batch.capacity for batch in batches):
            raise ValueError(
                "masks with a capacity serve one frames-per-clip group; several are packed back to back, "
                "with no room between them"
            )
        groups = [self.encoder.to_clips(group) for group in groups]
        for group, batch in zip(groups, batches, strict=True):
            if tuple(batch.grid[1:]) != tuple(batches[0].grid[1:]):
                raise ValueError(
                    f"groups of {tuple(batches[0].grid)} and {tuple(batch.grid)} tokens; the height and "
                    "width must be the same in all groups"
                )
            if len(group) != batch.batch_size or self.encoder.grid_of(group) != tuple(batch.grid):
                raise ValueError(
                    f"{len(group)} clips of {self.encoder.grid_of(group)} tokens but masks for "
                    f"{batch.batch_size} clips of {tuple(batch.grid)}"
                )
        with label("target encoder"):
            if self.cfg.objective == "pixels":
                features = pixel_tubelets(groups, self.encoder.tubelet_size, self.encoder.patch_size)
                rows = _rows_of_batches(batches, "target_rows")
            else:
                features, rows = self.encode_targets(groups, batches)
        with label("context encoder"):
            context, _ = self.encoder.forward_packed(groups, batches)
            context = label_backward(context, "context encoder")
        images = [self.encoder.is_image(group) for group in groups]
        of_context: Tensor | None = None
        with label("predictor"):
            if self.cfg.return_all_tokens:
                predictions, of_context = self.predictor.forward_packed_all(context, batches, images=images)
                of_context = label_backward(of_context, "predictor")
            else:
                targets = None
                if not self.cfg.use_mask_tokens:
                    norm = self.target_encoder.norm
                    targets = target_features(features, rows, (norm.weight, norm.bias, norm.eps)).detach()
                predictions = self.predictor.forward_packed(context, batches, targets=targets, images=images)
            predictions = label_backward(predictions, "predictor")
        with label("loss"):
            output = self._with_loss(predictions, features, rows, batches, context.detach())
            if of_context is not None:
                output.loss = output.loss + self._context_term(of_context, output, images)
            return output

    def _with_loss(
        self, predictions: Tensor, features: Tensor, rows: Tensor, batches: list[MaskBatch], context: Tensor
    ) -> JEPAOutput:
        weights = torch.cat([batch.token_weights(len(batches)) for batch in batches])
        norms = self.target_encoder.level_norms
        # Copies, as the target encoder moves on.
        weight, bias = (torch.cat([getattr(norm, name).detach() for norm in norms]) for name in ("weight", "bias"))
        final_norm: FinalNorm | None = (weight, bias, norms[0].eps)
        levels = len(norms)
        if self.cfg.objective == "pixels":
            final_norm, levels = None, CHANNELS
        loss = latent_loss(predictions, features, weights, self.loss_exp, rows, final_norm, levels)
        if self.reg_coeff != 0:
            loss = loss + self.reg_coeff * self._variance_term(predictions, batches)
        if self.prediction_l2 != 0:
            # Weighed as the main loss is, so that the term is the same however a batch is divided.
            squares = predictions.to(loss.dtype).square().mean(-1)
            loss = loss + self.prediction_l2 * (squares * weights.to(loss.dtype)).sum() / 2
        return JEPAOutput(loss, predictions, features, rows, final_norm, batches, context, levels, len(norms))

    def _context_term(self, predictions: Tensor, output: JEPAOutput, images: Sequence[bool]) -> Tensor:
        """Loss of the context tokens, weighed as configured (facebookresearch/vjepa2 at 204698b,
        app/vjepa_2_1/train.py, "Context loss").

        Args:
            predictions: [sum of context lengths, D].
            output: of the target tokens.
            images: which groups are of images.
        """
        weights = []
        for batch, image in zip(output.masks, images, strict=True):
            weight = batch.context_token_weights(len(output.masks)) * self.context_scale[int(image)]
            if self.weight_distance_loss:
                weight = weight * self._closeness(batch)
            weights.append(weight)
        rows = _rows_of_batches(output.masks, "context_rows")
        return latent_loss(
            predictions, output.features, torch.cat(weights), self.loss_exp, rows, output.final_norm, output.levels
        )

    def _closeness(self, batch: MaskBatch) -> Tensor:
        unit = batch.grid[1] // OFFSET_SIDE if self.offset_context_loss else 1
        if unit < 1:
            raise ValueError(
                f"offset_context_loss divides distances by rows of tokens // {OFFSET_SIDE}, but there are "
                f"{batch.grid[1]} rows; set loss.offset_context_loss=false"
            )
        return context_weights(
            batch.context_ids, batch.cu_seqlens_context, batch.target_ids, batch.cu_seqlens_target, batch.grid, unit
        )

    @staticmethod
    def _variance_term(predictions: Tensor, batches: Sequence[MaskBatch]) -> Tensor:
        """variance_loss, a clip weighing what its tokens weigh in the main loss.

        That is the reference's mean over clips where masks of one length are cut out of all of them. As the weights
        add up to 1 over groups, micro-batches and processes, so does the term, however a batch is divided.
        """
        terms = []
        for group, batch in zip(predictions.split([len(m.target_ids) for m in batches]), batches, strict=True):
            terms.append(variance_loss(group, batch.target_packing, batch.clip_weights(len(batches))))
        return torch.stack(terms).sum()

    @torch.no_grad()
    def encode_targets(self, clips: Sequence[Tensor], masks: Sequence[MaskBatch]) -> tuple[Tensor, Tensor]:
        """Output of the target encoder's last block, or of all its levels, for all tokens, [L, D], and the rows of
        those to predict.

        The final norm is left to the loss, which needs it for these rows only.
        """
        features, _ = self.target_encoder.forward_packed(clips, final_norm=False)
        return features, _rows_of_batches(masks, "target_rows")
