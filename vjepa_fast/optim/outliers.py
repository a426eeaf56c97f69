"""Skips steps with an outlying loss (V-JEPA 2.1's loss_reg_std_mult).

A step is skipped, after its backward pass, if its loss exceeds the mean of the last losses by so many of their standard
deviations; such a loss is not among the last ones of later steps (facebookresearch/vjepa2 at 204698b,
app/vjepa_2_1/train.py, trailing_losses). There each process judges by its own loss, so that some may take a step that
others skip; here all judge by their mean. Nothing waits for the device: the losses stay there, and what is found is a
tensor that the optimizer reads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vjepa_fast.config.schema import OptimizationConfig

MAX_OUTLIERS = 10
"""Skipped steps of a run, after which it gives up, as there."""


class LossOutliers:
    """Finds the steps to skip.

    Args:
        cfg: loss_reg_std_mult is set.
        device: of the losses.
    """

    def __init__(self, cfg: OptimizationConfig, device: torch.device) -> None:
        assert cfg.loss_reg_std_mult is not None and cfg.ipe is not None
        self.factor, self.size = cfg.loss_reg_std_mult, cfg.loss_reg_num_tracking_steps
        self.first_step = (cfg.loss_reg_min_epoch + 1) * cfg.ipe
        self._losses = torch.zeros(self.size, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._armed = torch.zeros((), dtype=torch.bool, device=device)
        self._places = torch.arange(self.size, device=device)

    def set_step(self, step: int) -> None:
        """Steps of the first loss_reg_min_epoch + 1 epochs are taken whatever their loss."""
        self._armed.fill_(step >= self.first_step)

    def __call__(self, loss: Tensor, num_processes: int = 1) -> Tensor:
        """Whether to skip the step, a bool scalar on the device; the loss is noted if not.

        Args:
            loss: scalar, this process's.
            num_processes: whose mean is judged.
        """
        loss = loss.detach().double()
        if num_processes > 1:
            # A sum of its own memory: reduced in place.
            loss = loss.clone()
            dist.all_reduce(loss)
            loss = loss / num_processes
        num_known = self._count.clamp(max=self.size)
        known = self._places < num_known
        mean = (self._losses * known).sum() / num_known
        variance = ((self._losses - mean).square() * known).sum() / num_known
        bound = mean + self.factor * variance.sqrt()
        outlier = self._armed & (num_known > self.size // 2) & (loss > bound)
        # Not-a-number would stay for good.
        noted = ~outlier & torch.isfinite(loss)
        here = noted & (self._places == self._count % self.size)
        self._losses.copy_(torch.where(here, loss, self._losses))
        self._count.add_(noted)
        return outlier

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run goes on with."""
        return {"losses": self._losses, "count": self._count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Args: state: of state_dict; other sizes (loss_reg_num_tracking_steps) begin anew."""
        if len(state["losses"]) == self.size:
            self._losses.copy_(state["losses"])
            self._count.copy_(state["count"])
