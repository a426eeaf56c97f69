"""Trains attentive probes on frozen features, with the reference's optimizer and schedules.

Reference: evals/video_classification_frozen/eval.py of facebookresearch/vjepa2 (V-JEPA 2: AdamW over all parameters, lr
and weight decay by cosine after a warm-up, set before each step counted from 1) and of facebookresearch/jepa (V-JEPA 1:
biases and norms without decay, each probe's gradients clipped to a norm of 1, decay 0.01 falling to 1e-6).

Legend: K heads, B clips, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.evaluation.head_grid import HeadGrid
from vjepa_fast.evaluation.labels import Labels
from vjepa_fast.evaluation.metrics import main_score, scores_of
from vjepa_fast.evaluation.probes import ProbeResult, ProbeSettings
from vjepa_fast.evaluation.report import CURVES, PROBE, draw_curves, write_probe

if TYPE_CHECKING:
    from vjepa_fast.evaluation.run_probes import FrozenFeatures

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


class AttentiveProbe:
    """`--probe attentive`: a grid of attentive probes on all tokens, the reference's."""

    reads: Literal["tokens"] = "tokens"

    def fit(
        self,
        features: FrozenFeatures,
        settings: ProbeSettings,
        device: torch.device,
        report: Callable[[int, int, str], None],
    ) -> ProbeResult:
        """See Probe.fit."""
        labels = features.labels
        own, spread, centre = _standardised(labels)
        num_tokens, dim = features.train_tokens(0, [0]).shape[1:]
        grid = HeadGrid.start(
            len(settings.heads), dim, settings.num_heads, labels.num_outputs, settings.depth, settings.seed
        ).to(device)
        together = grid.samples_together(num_tokens, device)
        classes = labels.task == "classification"
        history = History()
        outputs = torch.empty(0)

        def after_epoch(epoch: int, losses: list[float]) -> None:
            nonlocal outputs
            outputs = predict(
                grid, lambda numbers: features.val_tokens(numbers).to(device), len(labels.val.labels), together, classes
            )
            outputs = outputs if classes else outputs * spread + centre
            history.train_loss.append(losses)
            history.val_score.append([main_score(scores_of(labels, one)) for one in outputs])
            best = max(history.val_score[-1])
            report(epoch + 1, settings.epochs, f"best {'accuracy' if classes else 'R2'} {best:.3f}")

        report(0, settings.epochs, "")
        train_grid(
            grid,
            settings.heads,
            lambda epoch, numbers: features.train_tokens(epoch, numbers).to(device),
            own.to(device),
            settings.epochs,
            settings.batch_size,
            settings.seed,
            GridAdamW(grid, settings.decay_all, settings.clip_norm),
            after_epoch,
            together,
        )
        return _result(labels, settings, grid, history, outputs, spread, centre)


def _standardised(labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Training labels as the loss takes them, standardised for a regression; their spread; their centre."""
    own = labels.train.labels
    if labels.task == "classification":
        return own, torch.ones(1), torch.zeros(1)
    centre, spread = own.float().mean(0), own.float().std(0, unbiased=False)
    return (own.float() - centre) / spread, spread, centre


def _result(
    labels: Labels,
    settings: ProbeSettings,
    grid: HeadGrid,
    history: History,
    outputs: Tensor,
    spread: Tensor,
    centre: Tensor,
) -> ProbeResult:
    """Result of the head that is best on the validation set after the last epoch; outputs [K, N, C] of all heads."""
    winner = max(range(len(grid)), key=lambda head: history.val_score[-1][head])
    scores = [scores_of(labels, one) for one in outputs]
    heads: list[dict[str, Any]] = [
        {"lr": one.lr, "weight_decay": one.weight_decay, "train_loss": loss, "scores": own}
        for one, loss, own in zip(settings.heads, history.train_loss[-1], scores, strict=True)
    ]
    details = {
        "depth": settings.depth,
        "num_heads": settings.num_heads,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "augmented": settings.augmented,
        "best_head": winner,
        "heads": heads,
        "output_scale": spread.tolist(),
        "output_shift": centre.tolist(),
        "note": "the best head is chosen on the validation set after the last epoch, as in the reference",
        "train_loss_by_epoch": history.train_loss,
        "val_score_by_epoch": history.val_score,
    }
    title = (
        f"attentive, depth {settings.depth}, best of {len(heads)} "
        f"(lr {heads[winner]['lr']:g}, decay {heads[winner]['weight_decay']:g})"
    )

    def write_files(folder: Path) -> None:
        draw_curves(folder / CURVES, details, "top1" if labels.task == "classification" else "r2")
        write_probe(folder / PROBE, [grid.state_dict(head) for head in range(len(grid))], details, labels)

    return ProbeResult(title, scores[winner], outputs[winner], details, write_files)
