"""Loss weights: how much each predicted token counts, all rules in one place.

    loss of a step = sum over processes, micro-batches and target tokens of  w * |prediction - target|^p / p

(the mean over the features of a token is the loss operator's). The weights w of all target tokens of a step add up to
1, however the step is spread over processes and micro-batches, so the losses and gradients of the parts simply add up.
With G frames-per-clip groups present, M masks, b clips and k tokens of a clip:

    default                        w = 1 / (G M sum of k over the b clips)                            mean_over_tokens
    truncate: batch_min            w = 1 / (P G_p M b_p k), for each of P truncation groups p, whose
                                   clips all keep k tokens: the mean that the reference takes on each
                                   of its processes, averaged over them                              by_truncation_group
    truncate: none                 w = 1 / (pairs * tokens of the pair over all processes)            over_all_tokens
    masks of the reference         w = 1 / (G W M b k), W processes                                   of_reference_batch
    images beside videos           w = (1 - s) w of the videos, s w of the images                     MaskBatch.scaled
    context tokens (V-JEPA 2.1)    w of the clip's target tokens, spread over its context tokens      over_context

Data parallelism averages gradients over W processes where these weights ask for their sum: `process_factor` makes up
for it. The terms beside the distance (L2 penalty, variance, context tokens) have their own weights in models/jepa.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

Weights = tuple[float, ...]
"""One for each sequence: mask by mask, clip by clip; what each of its tokens weighs."""


def mean_over_tokens(lengths: Sequence[int], num_masks: int, num_groups: int) -> Weights:
    """Weights of a batch by itself: the mean over the tokens of a mask, then over masks and groups.

    Args:
        lengths: tokens of each sequence.
        num_masks: of the batch.
        num_groups: frames-per-clip groups that the loss is averaged over.
    """
    batch_size = len(lengths) // num_masks
    weights: list[float] = []
    for mask in range(num_masks):
        total = sum(lengths[mask * batch_size : (mask + 1) * batch_size])
        weights += [1.0 / (num_groups * num_masks * max(1, total))] * batch_size
    return tuple(weights)


def by_truncation_group(
    lengths: Sequence[int],
    num_masks: int,
    parts: Sequence[int],
    num_parts: int,
    num_groups: Mapping[int, int],
    num_clips: Mapping[int, int],
) -> Weights:
    """Weights of clips of which each truncation group has one length.

    Args:
        lengths: tokens of each sequence.
        num_masks: of the batch.
        parts: truncation group of each clip.
        num_parts: truncation groups of a step.
        num_groups: frames-per-clip groups present in each truncation group.
        num_clips: clips of this frames-per-clip group in each truncation group.
    """
    return tuple(
        1.0 / (num_parts * num_groups[part] * num_masks * num_clips[part] * max(1, length))
        for part, length in zip([*parts] * num_masks, lengths, strict=True)
    )


def over_all_tokens(counts: Tensor, batch_size: int, num_pairs: int) -> Weights:
    """The mean over all tokens of a mask in the step, then over the pairs of group and mask present.

    Args:
        counts: int64 [masks], tokens of all processes.
        batch_size: clips of this process.
        num_pairs: pairs of group and mask with tokens.
    """
    return tuple(1.0 / (num_pairs * max(1, int(count))) for count in counts for _ in range(batch_size))


def of_reference_batch(lengths: Sequence[int], num_masks: int, num_groups: int, num_processes: int) -> Weights:
    """Weights of masks from the reference's stream: the mean that the reference takes on each of its processes."""
    batch_size, scale = len(lengths) // num_masks, 1.0 / (num_groups * num_processes)
    return tuple(scale / (num_masks * length) / batch_size for length in lengths)


def over_context(weights: Weights, target_lengths: Sequence[int], context_lengths: Sequence[int]) -> Weights:
    """What context tokens weigh: what the targets of their sequence weigh together, spread evenly."""
    lengths = zip(weights, target_lengths, context_lengths, strict=True)
    return tuple(weight * target / max(1, context) for weight, target, context in lengths)


def process_factor(num_processes: int) -> int:
    """By which each process multiplies its share of the loss, since gradients are averaged and not added up."""
    return num_processes
