"""Learning rate, weight decay, momentum and clipping as pure functions of the step.

The reference advances its schedules before the optimizer step, so step 0 already uses the value after one increment
(facebookresearch/vjepa2, src/utils/schedulers.py and app/vjepa/train.py:299-302, 425-426). Here `step` counts from 0.
"""

from __future__ import annotations

import math

from vjepa_fast.config.schema import LossConfig, OptimizationConfig


class Schedules:
    """All schedules of a run."""

    def __init__(self, cfg: OptimizationConfig) -> None:
        assert cfg.ipe is not None
        self.cfg = cfg
        self.total = int(cfg.ipe_scale * cfg.epochs * cfg.ipe)
        self.warmup = int(cfg.warmup * cfg.ipe)
        self.anneal = int(cfg.anneal * cfg.ipe)
        self.momentum_span = cfg.ipe * cfg.epochs * cfg.ipe_scale

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        cfg, count = self.cfg, step + 1
        if cfg.schedule == "linear":
            return cfg.lr + count / max(1, self.total) * (cfg.final_lr - cfg.lr)
        if count < self.warmup:
            return cfg.start_lr + count / max(1, self.warmup) * (cfg.lr - cfg.start_lr)
        if cfg.schedule == "wsd":
            begin = self.total - self.anneal
            if count < begin:
                return cfg.lr
            return cfg.lr + (count - begin) / max(1, self.anneal) * (cfg.final_lr - cfg.lr)
        progress = (count - self.warmup) / max(1, self.total - self.warmup)
        return max(cfg.final_lr, _cosine(cfg.lr, cfg.final_lr, progress))

    def weight_decay(self, step: int) -> float:
        """Weight decay of a step: cosine from weight_decay to final_weight_decay."""
        first, last = self.cfg.weight_decay, self.cfg.final_weight_decay
        value = _cosine(first, last, (step + 1) / self.total)
        return max(last, value) if last <= first else min(last, value)

    def momentum(self, step: int) -> float:
        """EMA momentum of a step: linear from ema[0] to ema[1], then constant."""
        first, last = self.cfg.ema
        return first + min(step, self.momentum_span) * (last - first) / self.momentum_span

    def clip_norm(self, step: int) -> float | None:
        """Largest norm of the gradients: infinite until the second epoch after the warm-up; None: never clipped.

        The reference counts epochs from 0 and clips where the epoch is above the warm-up (facebookresearch/jepa,
        app/vjepa/train.py:468).
        """
        cfg = self.cfg
        if cfg.clip_grad is None:
            return None
        assert cfg.ipe is not None
        return cfg.clip_grad if step // cfg.ipe > cfg.warmup else math.inf


def context_scale(cfg: LossConfig, step: int) -> tuple[float, float]:
    """Weights of the context tokens' loss of videos and of images at a step (facebookresearch/vjepa2 at 204698b,
    app/vjepa_2_1/models/utils/modules.py, Lambda_LinearWarmupHold)."""
    share = 1.0
    if cfg.lambda_progressive:
        begin, end = cfg.lambda_warmup
        share = min(1.0, max(0, step - begin) / (end - begin))
    return cfg.lambda_value_vid * share, cfg.lambda_value_img * share


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * progress))
