"""Training of attentive probes on frozen features, with the reference's optimizer and schedules.

Reference: evals/video_classification_frozen/eval.py of facebookresearch/vjepa2 (V-JEPA 2: AdamW over all parameters, lr
and weight decay by cosine after a warm-up, set before each step counted from 1) and of facebookresearch/jepa (V-JEPA 1:
biases and norms without decay, each probe's gradients clipped to a norm of 1, decay 0.01 falling to 1e-6).

Legend: K heads, B clips, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.evaluation.head_grid import HeadGrid

_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class HeadSetting:
    """Schedules of one head."""

    lr: float
    weight_decay: float
    start_lr: float | None = None
    """None: lr."""
    final_lr: float = 0.0
    final_weight_decay: float | None = None
    """None: weight_decay."""
    warmup: float = 0.0
    """Epochs."""

    def at(self, step: int, num_steps: int, steps_per_epoch: int) -> tuple[float, float]:
        """Learning rate and weight decay of a step, counted from 1."""
        warm = int(self.warmup * steps_per_epoch)
        if step < warm:
            start = self.lr if self.start_lr is None else self.start_lr
            lr = start + step / max(1, warm) * (self.lr - start)
        else:
            lr = max(self.final_lr, _cosine(self.lr, self.final_lr, (step - warm) / max(1, num_steps - warm)))
        final = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        decay = _cosine(self.weight_decay, final, step / num_steps)
        return lr, max(final, decay) if final <= self.weight_decay else min(final, decay)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class GridAdamW:
    """torch.optim.AdamW with its defaults, with a learning rate and a weight decay for each head of a grid.

    Args:
        grid: of K heads.
        decay_all: also biases and tensors of one dimension (V-JEPA 2; V-JEPA 1 leaves them out).
        clip_norm: the gradients of each head are scaled down to this norm; None leaves them.
    """

    def __init__(self, grid: HeadGrid, decay_all: bool = True, clip_norm: float | None = None) -> None:
        self.grid, self.clip_norm = grid, clip_norm
        self._decayed = {
            name: decay_all or ("bias" not in name and value.ndim > 2) for name, value in grid.parameters.items()
        }
        self._mean = {name: torch.zeros_like(value) for name, value in grid.parameters.items()}
        self._square = {name: torch.zeros_like(value) for name, value in grid.parameters.items()}
        self._step = 0

    @torch.no_grad()
    def step(self, lr: Tensor, weight_decay: Tensor) -> None:
        """One update, which takes the gradients away.

        Args:
            lr, weight_decay: [K], fp32 or fp64.
        """
        self._step += 1
        if self.clip_norm is not None:
            squares = [
                value.grad.flatten(1).square().sum(1)
                for value in self.grid.parameters.values()
                if value.grad is not None
            ]
            share = (self.clip_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
        for name, value in self.grid.parameters.items():
            assert value.grad is not None
            shape = [-1] + [1] * (value.ndim - 1)
            gradient = value.grad if self.clip_norm is None else value.grad * share.view(shape)
            if self._decayed[name]:
                value.mul_((1 - lr * weight_decay).to(value.dtype).view(shape))
            mean, square = self._mean[name], self._square[name]
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            root = (square.sqrt() / math.sqrt(1 - _BETAS[1] ** self._step)).add_(_EPS)
            size = (lr / (1 - _BETAS[0] ** self._step)).to(value.dtype).view(shape)
            value.sub_(size * (mean / root))
            value.grad = None


@dataclass
class History:
    """What happened in training, by epoch.

    Attributes:
        train_loss: of each head, [epochs][K].
        val_score: of each head, [epochs][K]: top-1 accuracy, or the mean of R2 over targets.
    """

    train_loss: list[list[float]] = field(default_factory=list)
    val_score: list[list[float]] = field(default_factory=list)


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each head, [K]: cross-entropy, or the squared error for labels of a float dtype.

    Args:
        outputs: fp32 [K, B, C].
        labels: int64 [B], or [B, C].
    """
    if labels.is_floating_point():
        return (outputs - labels).square().mean((1, 2))
    flat = F.cross_entropy(outputs.flatten(0, 1), labels.repeat(len(outputs)), reduction="none")
    return flat.view(len(outputs), -1).mean(1)


def train_grid(
    grid: HeadGrid,
    settings: Sequence[HeadSetting],
    load: Callable[[int, Sequence[int]], Tensor],
    labels: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
    optimizer: GridAdamW,
    after_epoch: Callable[[int, list[float]], None],
    together: int | None = None,
) -> None:
    """Train all heads at once.

    Args:
        grid: of K heads.
        settings: K schedules.
        load: (epoch, sample numbers) -> features [B, N, D] on the device.
        labels: [N] or [N, C] of the training samples, on the device; of a regression, standardised.
        epochs: passes over the samples.
        batch_size: samples of a step; the last of an epoch may be smaller, as in the reference.
        seed: of the order.
        optimizer: of the grid.
        after_epoch: called with the epoch from 0 and the mean loss of each head.
        together: samples in memory at once; the gradients of a step are added up over such parts.
    """
    device = labels.device
    steps_per_epoch = math.ceil(len(labels) / batch_size)
    step = 0
    for epoch in range(epochs):
        total = torch.zeros(len(grid), device=device)
        for numbers in shuffled_batches(len(labels), batch_size, seed, epoch):
            step += 1
            rates = torch.tensor(
                [one.at(step, epochs * steps_per_epoch, steps_per_epoch) for one in settings], dtype=torch.float64
            ).T.to(device)
            part = together or len(numbers)
            for own in (numbers[start : start + part] for start in range(0, len(numbers), part)):
                losses = loss_of(grid(load(epoch, own)), labels[own])
                (losses.sum() * (len(own) / len(numbers))).backward()
                total += losses.detach() * len(own)
            optimizer.step(rates[0], rates[1])
        after_epoch(epoch, (total / len(labels)).tolist())


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Every number below `count` once, in an order of the epoch's own."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    for part in torch.randperm(count, generator=generator).split(batch_size):
        yield part.tolist()


@torch.no_grad()
def predict(
    grid: HeadGrid, load: Callable[[Sequence[int]], Tensor], count: int, batch_size: int, probabilities: bool
) -> Tensor:
    """Outputs of every head, fp32 [K, N, C] on the CPU: the mean over the views.

    Args:
        grid: of K heads.
        load: sample numbers -> features [B, views, N, D] on the device.
        count: N samples.
        batch_size: samples together.
        probabilities: softmax before the mean, as the reference does.
    """
    parts = []
    for start in range(0, count, batch_size):
        features = load(range(start, min(count, start + batch_size)))
        views = []
        for view in features.unbind(1):
            outputs = grid(view)
            views.append(outputs.softmax(-1) if probabilities else outputs)
        parts.append(torch.stack(views).mean(0).cpu())
    return torch.cat(parts, 1)
