"""Weighted L_p distance between predicted and target features.

loss = sum_i w_i * mean_d |prediction_id - target_id|^p / p. With w_i = 1 / (pairs * tokens of the pair) this is the
reference's loss, the mean over the tokens and features of a (frames-per-clip group, mask) pair, then over the pairs
(facebookresearch/vjepa2, app/vjepa/train.py:440-450).

Legend: K predicted tokens, D width.
"""

from __future__ import annotations

from torch import Tensor


def latent_loss(predictions: Tensor, targets: Tensor, weights: Tensor, exponent: float = 1.0) -> Tensor:
    """Scalar loss.

    Args:
        predictions: [K, D], any float dtype.
        targets: [K, D], fp32 or fp64; the difference is taken in this precision.
        weights: [K], converted to the dtype of the targets.
        exponent: p.
    """
    distance = (predictions.to(targets.dtype) - targets).abs()
    if exponent != 1.0:
        distance = distance**exponent
    return (distance.mean(-1) * weights.to(targets.dtype)).sum() / exponent
