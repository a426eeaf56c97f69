"""Statistics of targets, predictions and context features that tell learning from collapse.

Everything is computed on the device of the model from the last step's output and comes to the host in one copy, beside
the losses of a line of the log. So a step itself does nothing for it, and rows are taken in pieces, so that it needs
little memory.

Targets are layer-normed token by token, so that the mean square of their elements is 1. Part of that varies from token
to token, the rest is the same in all of them; `explained` says how much of the part that varies the predictions get.

Legend: K predicted tokens, C context tokens, D feature width, B clips, S sampled tokens of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.jepa import VJEPA, JEPAOutput
from vjepa_fast.ops.latent_loss import target_features
from vjepa_fast.optim.dtensors import kept_of

MAX_ROWS = 512
"""Evenly spaced tokens that effective ranks are taken over."""

CLIP_TOKENS = 64
"""Evenly spaced tokens of a clip whose mean stands for it."""

_PIECE = 8192
"""Rows that are worked on at once."""


class Spread:
    """Variance of each feature over rows that come in pieces.

    Sums are of differences from the first piece's mean, so that little is lost where a variance is small beside the
    mean, as it is in a collapse.
    """

    def __init__(self) -> None:
        self._count = 0
        self._shift = self._sum = self._squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """[k, D] in fp32 or fp64, k > 0."""
        if self._count == 0:
            self._shift = x.mean(0)
            self._sum, self._squares = torch.zeros_like(self._shift), torch.zeros_like(self._shift)
        x = x - self._shift
        self._count += len(x)
        self._sum = self._sum + x.sum(0)
        self._squares = self._squares + x.square().sum(0)

    @property
    def variance(self) -> Tensor:
        """[D], unbiased; zeros for fewer than two rows."""
        return ((self._squares - self._sum.square() / max(1, self._count)) / max(1, self._count - 1)).clamp_min(0)


def effective_ranks(features: Sequence[Tensor]) -> list[Tensor]:
    """exp of the entropy of the normalised singular values of each centred [k, D], a scalar on its device.

    Between 1 (all features move together) and min(k, D); nan where something is not finite. At most MAX_ROWS evenly
    spaced rows are used. Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Args:
        features: on one device, any float dtype, at least one row each.
    """
    grams, finite = [], []
    for x in features:
        x = x[:: max(1, -(-len(x) // MAX_ROWS))].float()
        finite.append(torch.isfinite(x).all())
        x = torch.nan_to_num(x, 0.0, 0.0, 0.0)
        x = x - x.mean(0)
        gram = x.T @ x if x.shape[1] <= MAX_ROWS else x @ x.T
        grams.append(gram)
    size = max(map(len, grams))
    # Zero eigenvalues add nothing to the entropy.
    grams = [F.pad(gram, (0, size - len(gram), 0, size - len(gram))) for gram in grams]
    singular = torch.linalg.eigvalsh(torch.stack(grams)).clamp_min(0).sqrt()
    shares = singular / singular.sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
    return [torch.where(ok, value, math.nan) for ok, value in zip(finite, entropy.exp().unbind(), strict=True)]


@torch.no_grad()
def health_figures(output: JEPAOutput, model: VJEPA, exponent: float) -> dict[str, Tensor]:
    """Scalars on the device, by name.

    `target_std`, `prediction_std` and `context_std` are standard deviations over tokens, averaged over the features;
    near 0 means that all tokens have the same features. `target_rank`, `prediction_rank` and `context_rank` are
    effective ranks. Context features are what the encoder hands to the predictor, layer-normed as targets are: where
    they are now, the target encoder follows. `clip_cosine` is the mean cosine between the mean targets of two clips,
    `explained` 1 - (mean squared error / variance of the targets): 0 for the best constant answer, 1 for a perfect
    one, below 0 for what is worse than a constant. `loss_mask<i>` and `loss_slot<t>` are the mean loss of the tokens of
    a mask and of a place in time (tubelets, from 0), nan where none was predicted. `target_gap` is the distance of the
    target encoder's weights from the encoder's over the norm of the latter, `weight_rms` the root mean square of the
    encoder's weights, both of the matrices of its first, middle and last block; where these are sharded, of this
    process's part.

    Args:
        output: of a step.
        model: that did it.
        exponent: p of the loss.
    """
    targets, predictions = Spread(), Spread()
    squared_error, tokens = [], []
    for rows, some in zip(output.target_rows.split(_PIECE), output.packed_predictions.split(_PIECE), strict=True):
        target = target_features(output.features, rows, output.final_norm, output.levels)
        some = some.to(target.dtype)
        targets.add(target)
        predictions.add(some)
        distance = (some - target).abs()
        squared_error.append(distance.square().sum())
        tokens.append((distance if exponent == 1.0 else distance.pow(exponent)).mean(-1) / exponent)
    context = Spread()
    for piece in output.context.split(_PIECE):
        context.add(_normed(piece, output.context_levels))
    error = torch.stack(squared_error).sum() / output.packed_predictions.numel()
    figures = {
        "target_std": targets.variance.sqrt().mean(),
        "prediction_std": predictions.variance.sqrt().mean(),
        "context_std": context.variance.sqrt().mean(),
        "explained": 1 - error / targets.variance.mean().clamp_min(1e-12),
        "clip_cosine": _clip_cosine(output),
    }
    every = _every(len(output.target_rows))
    some_targets = target_features(output.features, output.target_rows[::every], output.final_norm, output.levels)
    some_context = _normed(output.context[:: _every(len(output.context))], output.context_levels)
    ranks = effective_ranks([some_targets, output.packed_predictions[::every], some_context])
    figures |= zip(("target_rank", "prediction_rank", "context_rank"), ranks, strict=True)
    figures |= _loss_by_place(torch.cat(tokens), output.masks)
    return figures | _weight_figures(model)


def read_figures(figures: dict[str, Tensor]) -> dict[str, float]:
    """Values of scalars on one device, in one copy; those of masks and slots that nothing was predicted of left out."""
    values = torch.stack([figure.detach().double().reshape(()) for figure in figures.values()]).tolist()
    return {
        name: value
        for name, value in zip(figures, values, strict=True)
        if not (name.startswith(("loss_mask", "loss_slot")) and math.isnan(value))
    }


def _every(count: int) -> int:
    return max(1, -(-count // MAX_ROWS))


def _normed(x: Tensor, levels: int) -> Tensor:
    return target_features(x, None, None, levels)


def _clip_cosine(output: JEPAOutput) -> Tensor:
    """Over all pairs of clips of a group, averaged over the groups that have two."""
    first, cosines = 0, []
    for masks in output.masks:
        clips, tokens = masks.batch_size, masks.num_tokens
        within = torch.arange(0, tokens, -(-tokens // CLIP_TOKENS), device=output.features.device)
        rows = first + tokens * torch.arange(clips, device=within.device)[:, None] + within
        first += clips * tokens
        if clips < 2:
            continue
        sampled = target_features(output.features, rows.flatten(), output.final_norm, output.levels)
        unit = F.normalize(sampled.view(clips, len(within), -1).mean(1), dim=-1)
        cosines.append((unit.sum(0).square().sum() - clips) / (clips * (clips - 1)))
    return torch.stack(cosines).mean() if cosines else torch.full((), math.nan, device=output.features.device)


def _loss_by_place(tokens: Tensor, batches: Sequence[MaskBatch]) -> dict[str, Tensor]:
    """Means of the tokens' losses, [K]."""
    num_masks, num_slots = max(m.num_masks for m in batches), max(m.grid[0] for m in batches)
    sums = tokens.new_zeros(2, num_masks + num_slots)
    start = 0
    for m in batches:
        slots = m.target_ids[: sum(m.target_lengths)].long() // (m.grid[1] * m.grid[2])
        of_group = tokens[start : start + len(slots)]
        start += len(slots)
        # A matrix product and not a scatter, which on a GPU adds up in another order at every run.
        at = F.one_hot(slots, num_slots).to(tokens.dtype)
        sums[:, num_masks:] += torch.stack([of_group, torch.ones_like(of_group)]) @ at
        totals = [sum(m.target_lengths[i * m.batch_size : (i + 1) * m.batch_size]) for i in range(m.num_masks)]
        for i, part in enumerate(of_group.split(totals)):
            sums[0, i] += part.sum()
            sums[1, i] += len(part)
    names = [f"loss_mask{i}" for i in range(num_masks)] + [f"loss_slot{t}" for t in range(num_slots)]
    return dict(zip(names, (sums[0] / sums[1]).unbind(), strict=True))


def _weight_figures(model: VJEPA) -> dict[str, Tensor]:
    blocks = len(model.encoder.blocks)
    gaps, norms, count = [], [], 0
    for index in sorted({0, blocks // 2, blocks - 1}):
        own, theirs = (_matrices(network.blocks[index]) for network in (model.encoder, model.target_encoder))
        for weight, target in zip(own, theirs, strict=True):
            gaps.append((weight - target).float().square().sum())
            norms.append(weight.float().square().sum())
            count += weight.numel()
    gap, norm = torch.stack(gaps).sum(), torch.stack(norms).sum()
    return {"target_gap": (gap / norm.clamp_min(1e-30)).sqrt(), "weight_rms": (norm / max(1, count)).sqrt()}


def _matrices(block: nn.Module) -> list[Tensor]:
    """Where processes share them, this one's parts: the others are not asked."""
    return [kept_of(p) for p in block.parameters() if p.ndim == 2]
