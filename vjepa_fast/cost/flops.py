"""Counts the floating-point operations of a step from the config and the lengths of the masks.

Only matrix products and attention count, a multiply-add as two. A backward pass costs twice its forward; attention
that recomputes its scores does more, which is not credited. The patch embedding's input needs no gradient, so its
backward costs as much as its forward. Recomputed activations are not credited either: the same step with activation
checkpointing has the same count.

Legend: L tokens of all sequences, S sequences, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.sizes import size_of


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """One product [tokens, inputs] x [inputs, outputs]."""
    return 2 * tokens * inputs * outputs


def attention(lengths: Sequence[int], width: int) -> int:
    """Scores and weighted sums of all sequences: 4 * sum(length^2) * D."""
    return 4 * sum(length * length for length in lengths) * width


def transformer(
    lengths: Sequence[int],
    width: int,
    depth: int,
    mlp_ratio: float,
    swiglu: bool = False,
    wide_swiglu: bool = True,
    last: int | None = None,
) -> int:
    """Forward of all blocks over packed sequences, the last one's projection and MLP for `last` tokens (None: all)."""
    tokens, hidden = sum(lengths), int(width * mlp_ratio)
    if swiglu and wide_swiglu:
        hidden = (int(2 * hidden / 3) + 7) // 8 * 8

    def after_attention(tokens: int) -> int:
        return linear(tokens, width, width) + (3 if swiglu else 2) * linear(tokens, width, hidden)

    before = depth * (linear(tokens, width, 3 * width) + attention(lengths, width))
    return before + (depth - 1) * after_attention(tokens) + after_attention(tokens if last is None else last)


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step, by part."""

    target_encoder: int
    """Forward only."""
    context_encoder: int
    """Forward and backward."""
    predictor: int
    """Forward and backward."""

    @property
    def total(self) -> int:
        return self.target_encoder + self.context_encoder + self.predictor


def step_flops(cfg: ModelConfig, masks: MaskBatch | Sequence[MaskBatch], images: Sequence[bool] = ()) -> StepFlops:
    """Operations of a step.

    Args:
        cfg: of the model.
        masks: of each frames-per-clip group.
        images: which groups are of images, whose patches have one frame; those behind its end are not.
    """
    batches = [masks] if isinstance(masks, MaskBatch) else list(masks)
    size = size_of(cfg)
    whole = [batch.num_tokens for batch in batches for _ in range(batch.batch_size)]
    context = [length for batch in batches for length in batch.context_lengths]
    of_images = [batch for batch, image in zip(batches, images, strict=False) if image]
    target = [length for batch in batches for length in batch.target_lengths]
    both = [length for batch in batches for length in batch.total_lengths]
    assert cfg.patch_size is not None and cfg.tubelet_size is not None and cfg.num_frames is not None
    tubelet = cfg.tubelet_size if cfg.num_frames > 1 else 1
    pixels = 3 * cfg.patch_size**2

    def patches(all_lengths: list[int], of_images: int) -> int:
        tokens = (sum(all_lengths) - of_images) * tubelet + of_images
        return linear(tokens, pixels, size.embed_dim)

    def encoder(lengths: list[int]) -> int:
        return transformer(lengths, size.embed_dim, size.depth, size.mlp_ratio, cfg.use_silu, cfg.wide_silu)

    levels, all_tokens = cfg.n_output_distillation or 1, cfg.return_all_tokens
    embed = linear(sum(context), size.embed_dim, cfg.pred_embed_dim)
    if levels > 1:
        embed += linear(sum(context), levels * size.embed_dim, size.embed_dim)
    predictor = (
        embed
        + transformer(
            both,
            cfg.pred_embed_dim,
            cfg.pred_depth,
            4.0,
            cfg.use_pred_silu,
            cfg.wide_silu,
            None if all_tokens else sum(target),
        )
        + linear(sum(both) if all_tokens else sum(target), cfg.pred_embed_dim, levels * size.embed_dim)
    )
    return StepFlops(
        target_encoder=patches(whole, sum(b.batch_size * b.num_tokens for b in of_images)) + encoder(whole),
        context_encoder=2 * patches(context, sum(n for b in of_images for n in b.context_lengths))
        + (3 * encoder(context)),
        predictor=3 * predictor,
    )
