"""Detects collapse and trivial solutions, names the cause, and suggests settings.

The bounds follow from what is measured, not from a model or a set of videos. Targets are layer-normed token by token,
so the mean square of their elements is 1, whatever the encoder: of that, std ** 2 differs from token to token and the
rest is one vector that all tokens share. Features of the context encoder are measured in the same way, and the target
encoder becomes what the context encoder is. An effective rank counts directions. What the predictor explains is held
against the best constant answer. `vjepa_fast.train.monitor.health` computes the figures.

Nothing here changes training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vjepa_fast.config.schema import Config
from vjepa_fast.optim.schedules import Schedules

CONSTANT_STD = 0.1
"""Below it less than 1 % of the features' energy, 0.1 ** 2, tells one token from another."""

LINE_RANK = 2.0
"""Below it tokens differ in less than two directions: all of them lie on a line."""

LOST_RANK = 3.0
"""Targets whose effective rank fell by this factor below the highest that the run had: two thirds of the
directions in which tokens differed are gone."""

UNLEARNT_RANK, UNLEARNT_EXPLAINED = 2.0, 0.1
"""Half of the directions gone while the predictor explains less than a tenth: the targets get simpler by themselves,
and not because anything was learnt."""

CONSTANT_EXPLAINED = 0.02
"""Share of the targets' variance below which the predictor does no better than one answer for all tokens. A random
direction of a few hundred explains less."""

PATIENCE = 100
"""Steps after the warm-up, or as many as that had, in which a predictor may begin with a constant answer, as all do.
After them three looks in a row count: a healthy run falls back for a while."""

WORSE_EXPLAINED = -0.2
"""Predictions that are so much worse than the best constant do not even find that one."""

REACH = 4.0
"""How far the mean of predictions must have been able to move before that counts: elements of layer-normed targets are
seldom larger. Adam moves each weight of the last layer by about the learning rate a step, and its input is of the
predictor's width, with elements of about 1."""

VISIBLE_EXPLAINED = 0.95
"""More than this cannot be told from other places of a clip, noise and texture being what they are: it is copied."""

GONE_WEIGHTS = 0.1
"""Matrices of the encoder at less than this share of their first size, where decay alone would have taken them there:
what a branch of two of them adds is then a hundredth, and hardly anything reaches the features."""

FAST_MOMENTUM = 0.99
"""Below it half of the target encoder is less than 70 steps old."""

LARGE_UPDATE = 0.3
"""Learning rate over the root mean square of the weights; an update of Adam is about the learning rate, so that it
changes a weight by this share of its size."""


@dataclass(frozen=True)
class Finding:
    """What is wrong."""

    kind: str
    """What is seen: `constant targets`, `constant features`, `lost directions`, `constant answer`, `visible answer`,
    `worse than a constant`, `vanishing weights`."""
    cause: str
    """Of what can be told apart: `gradient`, `momentum`, `weight decay`, `learning rate`, `masks`, `penalty`;
    else `unknown`."""
    text: str
    """A warning for people, without the step."""


class CollapseWatch:
    """Looks at the rows that a run writes to metrics.jsonl, in order; says each kind of finding once, when two rows one
    after the other show it: figures are of one step's clips, and a few dull ones differ little from one another.

    Args:
        cfg: of the run, with optimization.ipe set.
    """

    def __init__(self, cfg: Config) -> None:
        self._schedules = Schedules(cfg.optimization)
        self._loss = cfg.loss
        self._said: set[str] = set()
        self._best_rank = self._largest_update = 0.0
        self._first_rms: float | None = None
        self._next_step = 0
        self._kept, self._decayed = 1.0, 0.0
        self._reach, self._width = 0.0, cfg.model.pred_embed_dim
        self._seen, self._num_constant = "", 0

    def observe(self, row: Mapping[str, float | None]) -> Finding | None:
        """A row of metrics.jsonl, figures that are not finite being None or nan; None where all is well."""
        figures = {name: math.nan if value is None else float(value) for name, value in row.items()}
        step = int(figures["step"])
        for earlier in range(self._next_step, step + 1):
            self._kept *= self._schedules.momentum(earlier)
            lr = self._schedules.lr(earlier)
            self._decayed += lr * self._schedules.weight_decay(earlier)
            self._reach += lr * self._width
        self._next_step = max(self._next_step, step + 1)
        self._first_rms = self._first_rms or figures["weight_rms"]
        self._largest_update = max(self._largest_update, self._schedules.lr(step) / max(figures["weight_rms"], 1e-30))
        found = self._find(step, figures)
        if math.isfinite(figures["target_rank"]):
            self._best_rank = max(self._best_rank, figures["target_rank"])
        before, self._seen = self._seen, "" if found is None else found.kind
        if found is None or found.kind != before or found.kind in self._said:
            return None
        self._said.add(found.kind)
        return found

    def _find(self, step: int, f: Mapping[str, float]) -> Finding | None:
        # Comparisons with nan are false: figures that could not be had find nothing.
        if f["target_std"] < CONSTANT_STD:
            return self._collapse(
                "constant targets",
                step,
                f,
                (
                    f"the targets collapse: all tokens have nearly the same (std {f['target_std']:.3f}, less than 1 % "
                    "of their energy tells one token from another)"
                ),
            )
        if f["context_std"] < CONSTANT_STD:
            return self._collapse(
                "constant features",
                step,
                f,
                (
                    "the encoder collapses: all tokens it sees get nearly the same features (std "
                    f"{f['context_std']:.3f}), and the targets follow"
                ),
            )
        if f["context_rank"] < LINE_RANK:
            return self._collapse(
                "lost directions",
                step,
                f,
                (
                    f"the encoder collapses: its features differ in one direction only (effective rank "
                    f"{f['context_rank']:.1f}), and the targets follow"
                ),
            )
        if f["weight_rms"] < GONE_WEIGHTS * (self._first_rms or 0.0) and self._decayed > 1:
            return self._collapse("vanishing weights", step, f, "the encoder's weights vanish, and features with them")
        unlearnt = f["explained"] < UNLEARNT_EXPLAINED and f["target_rank"] < self._best_rank / UNLEARNT_RANK
        if unlearnt or f["target_rank"] < self._best_rank / LOST_RANK:
            return self._collapse(
                "lost directions",
                step,
                f,
                (
                    f"the targets collapse: they differ in ever fewer directions (effective rank "
                    f"{f['target_rank']:.1f}, it was {self._best_rank:.0f})"
                ),
            )
        return self._easy_answer(step, f)

    def _easy_answer(self, step: int, f: Mapping[str, float]) -> Finding | None:
        """What the predictor does, where the features are well."""
        if f["explained"] > VISIBLE_EXPLAINED:
            return Finding(
                "visible answer",
                "masks",
                (
                    f"the task is too easy: {100 * f['explained']:.0f} % of what differs in the targets is predicted, "
                    "as if the answers were among what the encoder sees. Look at the masks with `vjepa-fast masks`; "
                    "try a larger mask.masks.0.spatial_scale and temporal_scale, or a smaller "
                    "mask.masks.0.max_temporal_keep"
                ),
            )
        warmup = self._schedules.warmup
        if f["explained"] < WORSE_EXPLAINED and step >= warmup and self._reach > REACH:
            return self._worse(f)
        self._num_constant = self._num_constant + 1 if f["explained"] < CONSTANT_EXPLAINED else 0
        if self._num_constant >= 2 and step >= warmup + max(PATIENCE, warmup):
            exponent = "" if self._loss.loss_exp == 2 else "loss.loss_exp=2 (with 1 a constant is best for many), "
            return Finding(
                "constant answer",
                "unknown",
                (
                    f"the predictor slides to an easy answer: the same for all tokens (std {f['prediction_std']:.3f} "
                    f"where the targets have {f['target_std']:.2f}), no better than the best constant. Try {exponent}"
                    "a larger optimization.lr, optimization.betas=[0.9, 0.95], model.zero_init_mask_tokens=false"
                ),
            )
        return None

    def _worse(self, f: Mapping[str, float]) -> Finding:
        seen = (
            f"the predictor slides to an easy answer: it is worse than one constant for all tokens (explained "
            f"{100 * f['explained']:.0f} %, std {f['prediction_std']:.3f} where the targets have "
            f"{f['target_std']:.2f})"
        )
        pull = self._loss.prediction_l2
        if pull > 0:
            # The minimum of (p - t)^2 + pull p^2.
            return Finding(
                "worse than a constant",
                "penalty",
                (
                    f"{seen}. The penalty loss.prediction_l2={pull:g} pulls predictions towards 0, with a squared "
                    f"error to {100 / (1 + pull):.0f} % of the targets. Try a smaller loss.prediction_l2, or 0"
                ),
            )
        return Finding(
            "worse than a constant",
            "learning rate",
            (
                f"{seen}, as when steps are too large. Try a smaller optimization.lr, a longer optimization.warmup, or "
                "optimization.clip_grad=1"
            ),
        )

    def _collapse(self, kind: str, step: int, f: Mapping[str, float], seen: str) -> Finding:
        momentum = self._schedules.momentum(step)
        lag, rms, first_rms = 1 - self._kept, f["weight_rms"], self._first_rms or math.nan
        moved = f"{100 * lag:.0f} %"
        if kind == "constant targets" and lag < 0.5:
            cause, advice = (
                "gradient",
                (
                    f"The moving average can have made up only {moved} of the target encoder since the run began, so "
                    "something else moves it: a gradient reaches the targets, or the encoder itself makes them. Use "
                    "target_encoder under torch.no_grad(), keep its requires_grad false, and leave it out of other "
                    "optimizers"
                ),
            )
        elif rms < first_rms / 2 and self._decayed > 0.5:
            cause, advice = (
                "weight decay",
                (
                    f"Weight decay takes the weights away: they are at {rms / first_rms:.2g} of their size. Try a "
                    "smaller optimization.weight_decay and final_weight_decay (0.04 is usual)"
                ),
            )
        elif self._largest_update > LARGE_UPDATE:
            cause, advice = (
                "learning rate",
                (
                    f"A step changes weights by up to {100 * self._largest_update:.0f} % of their size. Try a smaller "
                    "optimization.lr, a longer optimization.warmup, or optimization.clip_grad=1"
                ),
            )
        elif momentum < FAST_MOMENTUM:
            cause, advice = (
                "momentum",
                (
                    f"The target encoder follows the encoder too fast (momentum {momentum:g}), so that both can agree "
                    "on something easy. Try optimization.ema=[0.998, 1.0], or a smaller optimization.lr"
                ),
            )
        else:
            cause, advice = (
                "unknown",
                (
                    "Try a smaller optimization.lr, a momentum nearer to 1 (optimization.ema), or loss.reg_coeff=1, "
                    "which punishes predictions that do not vary"
                ),
            )
        return Finding(kind, cause, f"{seen}. {advice}")
