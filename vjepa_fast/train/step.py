"""One training step: forward, backward, AdamW, EMA, with the schedules in the reference's order.

Schedules first, then forward and backward, then the optimizer, then the target encoder (facebookresearch/vjepa2,
app/vjepa/train.py:424-487). A step whose gradients are not finite leaves the weights as they are, but the target
encoder still moves, as with the reference's GradScaler; there is a scaler only for fp16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.common.profiler_labels import BACKWARD, label
from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.loss_weights import process_factor
from vjepa_fast.models.jepa import VJEPA, JEPAOutput
from vjepa_fast.ops.fp8_linear import check_device
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.optim.outliers import LossOutliers
from vjepa_fast.optim.schedules import Schedules, context_scale


@dataclass
class StepResult:
    """What a step did. Tensors stay on the device; reading one waits for it."""

    loss: Tensor
    """Scalar: this process's share of the loss times the number of processes; their mean is the loss of the step."""
    grad_norm: Tensor
    """Scalar: norm of all gradients together, before any clipping."""
    part_norms: Tensor
    """[2]: of the encoder's gradients and of the predictor's."""
    skipped: Tensor
    """Scalar: 1 where the gradients were not finite, or the loss was an outlier."""
    lr: float
    weight_decay: float
    momentum: float
    output: JEPAOutput
    """Output of the last micro-batch, detached."""

    @property
    def schedule(self) -> dict[str, float]:
        """What the schedules gave, by the names of the log's columns."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "momentum": self.momentum}


class TrainStep:
    """Callable that trains a model one step at a time.

    Args:
        model: to be trained, on its device; made by `VJEPA.from_config(cfg)`, or with the same loss.
        cfg: optimization, loss; the model's own dtype.
        data_parallel: `model` wrapped for several processes.
        num_processes: how many there are.
        make_optimizer: of the model, with lr, betas, eps and weight_decay.

    Raises:
        ValueError: the model has another loss than the config.
    """

    def __init__(
        self,
        model: VJEPA,
        cfg: Config,
        data_parallel: DistributedDataParallel | None = None,
        num_processes: int = 1,
        make_optimizer: Callable[..., AdamWEMA] = AdamWEMA,
    ) -> None:
        self.model = model
        self.loss = cfg.loss
        _check_loss(model, cfg)
        self.forward = data_parallel or model
        self.num_processes = num_processes
        self.num_micro = cfg.optimization.grad_accumulation
        self.schedules = Schedules(cfg.optimization)
        opt = cfg.optimization
        self.optimizer = make_optimizer(model, lr=opt.lr, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay)
        device = next(model.parameters()).device
        self.outliers = LossOutliers(opt, device) if opt.loss_reg_std_mult is not None else None
        """Finds steps to skip; None: all are taken."""
        if cfg.model.target_precision == "float8":
            check_device(device)
        self.scaler = torch.amp.GradScaler(device.type) if cfg.model.dtype == "float16" else None

    def __call__(
        self, step: int, clips: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]
    ) -> StepResult:
        """Train on one batch.

        Args:
            step: counts from 0; places the schedules.
            clips, masks: as VJEPA.forward.
        """
        scheduled = self.set_schedules(step)
        loss, output = self.update(clips, masks)
        grad_norm, part_norms, skipped = self.optimizer.grad_norm, self.optimizer.part_norms, self.optimizer.skipped
        assert grad_norm is not None and part_norms is not None and skipped is not None
        return StepResult(loss, grad_norm, part_norms, skipped, *scheduled, output)

    def set_schedules(self, step: int) -> tuple[float, float, float]:
        """Learning rate, weight decay and momentum of a step, which the optimizer gets to know.

        Likewise the model what the loss of context tokens weighs.
        """
        if self.outliers is not None:
            self.outliers.set_step(step)
        if self.loss.predict_all:
            for place, value in zip(self.model.context_scale.unbind(), context_scale(self.loss, step), strict=True):
                place.fill_(value)
        lr, weight_decay = self.schedules.lr(step), self.schedules.weight_decay(step)
        momentum = self.schedules.momentum(step)
        self.optimizer.clip_norm = self.schedules.clip_norm(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["ema_momentum"] = momentum
            if not group.get("WD_exclude"):
                group["weight_decay"] = weight_decay
        return lr, weight_decay, momentum

    def update(
        self, clips: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]
    ) -> tuple[Tensor, JEPAOutput]:
        """Forward, backward and update with the optimizer's present values; loss and output as of StepResult."""
        groups = [clips] if isinstance(clips, Tensor) else list(clips)
        batches = [masks] if isinstance(masks, MaskBatch) else list(masks)
        loss, output = self._backward(groups, batches)
        with label("optimizer"):
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            if self.outliers is not None:
                self.optimizer.flush()
                self.optimizer.veto = self.outliers(loss, self.num_processes)
            self.optimizer.step()
            if self.scaler is not None:
                self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return loss, output

    def _backward(self, groups: list[Tensor], batches: list[MaskBatch]) -> tuple[Tensor, JEPAOutput]:
        total: Tensor | None = None
        micro_batches = self._split(groups, batches)
        for index, (some_clips, some_masks) in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                output = self.forward(some_clips, some_masks)
                loss = output.loss * process_factor(self.num_processes)
                with label(BACKWARD):
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total, replace(output, loss=output.loss.detach(), packed_predictions=output.packed_predictions.detach())

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """For a backward whose gradients are kept until that of the last micro-batch."""
        if isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return self.optimizer.no_sync()

    def _split(self, groups: list[Tensor], batches: list[MaskBatch]) -> list[tuple[list[Tensor], list[MaskBatch]]]:
        if self.num_micro == 1:
            return [(groups, batches)]
        weighed = [batch.with_weights(len(batches)) for batch in batches]
        parts = []
        for index in range(self.num_micro):
            chosen = []
            for group, batch in zip(groups, weighed, strict=True):
                start, stop = (len(group) * i // self.num_micro for i in (index, index + 1))
                if stop > start:
                    chosen.append((group[start:stop], batch.narrow(start, stop)))
            if chosen:
                parts.append(([group for group, _ in chosen], [batch for _, batch in chosen]))
        return parts


def _check_loss(model: VJEPA, cfg: Config) -> None:
    wanted = cfg.loss.model_options()
    wrong = [
        f"{name} is {value} and not {wanted[name]}"
        for name, value in model.loss_options.items()
        if value != wanted[name]
    ]
    if wrong:
        raise ValueError(
            f"the model's loss is not the one in the config: {', '.join(wrong)}; build it with VJEPA.from_config(cfg)"
        )
