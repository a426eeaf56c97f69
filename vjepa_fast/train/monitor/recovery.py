"""Recovers from bad steps: rolls back to the last checkpoint, or stops the run with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.optim.outliers import MAX_OUTLIERS
from vjepa_fast.train.monitor.bad_steps import BadSteps
from vjepa_fast.train.monitor.pending_metrics import Pending, StepMetrics

MAX_SKIPPED = 50
"""Steps in a row with non-finite gradients after which a run gives up."""


class Recovery:
    """Counts bad steps and decides when to roll back and when to give up.

    Args:
        cfg: train.rollback_after, train.max_rollbacks, train.spike_factor.
        folder: run folder, where bad steps are listed.
        rank: of this process.
        roll_back: brings weights and optimizer back to the last checkpoint; all processes.
        say: prints a line for people.
    """

    def __init__(
        self, cfg: Config, folder: Path, rank: int, roll_back: Callable[[], None], say: Callable[[str], object]
    ) -> None:
        self.cfg, self.folder, self._roll_back, self._say = cfg, folder, roll_back, say
        self.bad_steps = BadSteps(folder, rank, cfg.train.spike_factor)
        self._num_rollbacks = 0
        self._num_outliers = 0

    def observe(self, step: int, pending: Sequence[Pending], steps: StepMetrics, saved_step: int | None) -> None:
        """Act on some steps that are done; the same on all processes.

        Args:
            step: steps done.
            pending, steps: these steps, and what was read back of them.
            saved_step: of the last checkpoint of this run; None: there is none.

        Raises:
            UserError: too many of them went wrong.
        """
        for p, loss, norm, skip in zip(pending, steps.losses, steps.norms, steps.skipped, strict=True):
            self.bad_steps.observe(p.step, loss, norm, bool(skip) and not math.isfinite(norm), p.sample_ids)
            # Its gradients were finite, so that its loss was an outlier.
            self._num_outliers += bool(skip) and math.isfinite(norm)
        if self._num_outliers > MAX_OUTLIERS:
            raise UserError(
                f"{self._num_outliers} steps up to step {step} were skipped because of their loss, more than "
                f"{self.cfg.optimization.loss_reg_std_mult:g} standard deviations above the mean of the last ones; "
                f"checkpoints are in {self.folder}. Try a smaller optimization.lr, or a larger "
                "optimization.loss_reg_std_mult"
            )
        num_bad = self.bad_steps.in_a_row
        if num_bad >= self.cfg.train.rollback_after and self._can_roll_back(saved_step):
            self._go_back(step, saved_step)
        elif num_bad >= MAX_SKIPPED:
            again = f", after going back {self._num_rollbacks} times" if self._num_rollbacks else ""
            raise UserError(
                f"the gradients were not finite in {num_bad} steps in a row, up to step {step}{again}; "
                f"checkpoints are in {self.folder}, the steps and their clips in {self.bad_steps.path}. Try a smaller "
                "optimization.lr, or train.dtype=bfloat16 in place of float16"
            )

    def delays_checkpoint(self, saved_step: int | None) -> bool:
        """Whether a checkpoint had better wait: a roll-back needs one from before the bad steps."""
        return self.bad_steps.in_a_row > 0 and self._can_roll_back(saved_step)

    def _can_roll_back(self, saved_step: int | None) -> bool:
        return saved_step is not None and self._num_rollbacks < self.cfg.train.max_rollbacks

    def _go_back(self, step: int, saved_step: int | None) -> None:
        self._roll_back()
        self._num_rollbacks += 1
        self._say(
            f"the last {self.bad_steps.in_a_row} steps up to step {step} were bad ({self.bad_steps.path}): "
            f"back to the weights of step {saved_step}, on with the data that comes next; this is time "
            f"{self._num_rollbacks} of at most {self.cfg.train.max_rollbacks}"
        )
        self.bad_steps.in_a_row = 0
