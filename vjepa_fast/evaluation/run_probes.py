"""A frozen evaluation from two manifests: features, then probes on them, then what they scored.

Three kinds of probes. `attentive`: a grid of attentive probes on all tokens, the reference's. `linear`: ridge
regression on the mean of the tokens, the penalty chosen by leave-one-out on the training set. `knn`: the nearest
training samples by the mean of the tokens, how many chosen the same way. The last two have no randomness, take
seconds, and see plain clips (with several versions of a video, one that is left out would still be there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.evaluation.attentive_probe import GridAdamW, HeadSetting, History, predict, train_grid
from vjepa_fast.evaluation.features import MEAN, TOKENS, Entry, FeatureStore, FillProgress, entries_of
from vjepa_fast.evaluation.head_grid import HeadGrid
from vjepa_fast.evaluation.labels import Labels
from vjepa_fast.evaluation.linear_probe import Ridge
from vjepa_fast.evaluation.metrics import classification_scores, confusion, r2_scores
from vjepa_fast.evaluation.neighbours import nearest, vote
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference.model import InferenceModel

Kind = Literal["attentive", "linear", "knn"]
NEIGHBOURS = (1, 5, 10, 20, 50)
"""Tried numbers of neighbours."""


@dataclass(frozen=True)
class ProbeSettings:
    """How attentive probes are trained.

    Attributes:
        heads: their schedules.
        depth: blocks, the last of which is the cross-attention.
        num_heads: attention heads.
        epochs: passes over the training videos.
        batch_size: videos of a step.
        decay_all, clip_norm: of GridAdamW.
        augmented: augmented versions of each training video, of which epoch e sees number e % augmented; 0: the
            plain clips.
        seed: of weights, order and augmentations.
    """

    heads: Sequence[HeadSetting]
    depth: int
    num_heads: int
    epochs: int = 20
    batch_size: int = 64
    decay_all: bool = True
    clip_norm: float | None = None
    augmented: int = 0
    seed: int = 0


@dataclass
class ProbeResult:
    """What one kind of probe scored.

    Attributes:
        scores: on the validation set; of the best head, for attentive probes.
        outputs: [N, C] on the validation set, likewise: probabilities, or predicted numbers.
        details: what else a report holds.
        history: of attentive probes.
        states: state dict of every head of attentive probes.
    """

    scores: dict[str, Any]
    outputs: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    history: History | None = None
    states: list[dict[str, Tensor]] = field(default_factory=list)


class FrozenFeatures:
    """Features of both splits, without the videos that cannot be read.

    Args:
        store: where they are kept.
        labels: of both splits.
        rule: how a video becomes clips; its views are those of validation, training has one.
        settings: of the attentive probes, for augmented versions.
    """

    def __init__(self, store: FeatureStore, labels: Labels, rule: ClipRule, settings: ProbeSettings) -> None:
        self.store, self.labels = store, labels
        plain = replace(rule, views=1)
        rules = (
            [plain]
            if settings.augmented == 0
            else [replace(plain, version=version, seed=settings.seed) for version in range(settings.augmented)]
        )
        self._plain, *versions = entries_of(labels.train.videos, [plain, *rules])
        self._train = versions
        (self._val,) = entries_of(labels.val.videos, [rule])
        self.broken: dict[str, str] = {}

    def fill(
        self,
        model: InferenceModel,
        device: torch.device,
        kinds: Sequence[str],
        batch_size: int,
        num_workers: int,
        report: Callable[[FillProgress], None],
    ) -> FillProgress:
        """Compute what is missing for some kinds of probes; see FeatureStore.fill.

        Raises:
            UserError: the disk is full, or the videos of a split that can be read are too few.
        """
        # A video that is in both manifests is one entry where the rules agree.
        entries: dict[str, Entry] = {}
        whole: set[str] = set()
        if "attentive" in kinds:
            entries |= {entry.key: entry for own in (*self._train, self._val) for entry in own}
            whole = set(entries)
        if set(kinds) != {"attentive"}:
            entries |= {entry.key: entry for own in (self._plain, self._val) for entry in own}
        progress = self.store.fill(
            list(entries.values()), model, device, [key in whole for key in entries], batch_size, num_workers, report
        )
        self.broken = progress.broken
        self.labels = self.labels.without(set(self.broken))
        self._train, self._plain = [self._readable(own) for own in self._train], self._readable(self._plain)
        self._val = self._readable(self._val)
        return progress

    def _readable(self, entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.videos.paths[entry.number] not in self.broken]

    def train_tokens(self, epoch: int, numbers: Sequence[int]) -> Tensor:
        """[B, N, D] of some training videos, in the version of the epoch."""
        own = self._train[epoch % len(self._train)]
        return torch.stack([self.store.read(f"{TOKENS}.{own[number].key}")[0] for number in numbers])

    def val_tokens(self, numbers: Sequence[int]) -> Tensor:
        """[B, views, N, D] of some validation videos."""
        return torch.stack([self.store.read(f"{TOKENS}.{self._val[number].key}") for number in numbers])

    def train_means(self) -> Tensor:
        """fp32 [N, D], of plain clips."""
        return torch.cat([self.store.read(f"{MEAN}.{entry.key}") for entry in self._plain])

    def val_means(self) -> Tensor:
        """fp32 [N, views, D]."""
        return torch.stack([self.store.read(f"{MEAN}.{entry.key}") for entry in self._val])


def scores_of(labels: Labels, outputs: Tensor) -> dict[str, Any]:
    """Scores on the validation set of outputs [N, C]."""
    if labels.task == "classification":
        return classification_scores(outputs, labels.val.labels)
    each = r2_scores(outputs, labels.val.labels)
    error = (outputs.double() - labels.val.labels).abs().mean(0)
    return {
        "r2": float(each.mean()),
        "r2_by_target": dict(zip(labels.targets, each.tolist(), strict=True)),
        "mean_absolute_error": dict(zip(labels.targets, error.tolist(), strict=True)),
    }


def main_score(scores: dict[str, Any]) -> float:
    """The score that heads are compared by."""
    value = float(scores["top1"] if "top1" in scores else scores["r2"])
    return -math.inf if math.isnan(value) else value


def baseline(labels: Labels) -> ProbeResult:
    """What knowing the training labels alone is worth: their frequencies, or their mean."""
    one_hot = _targets(labels, labels.train.labels)
    outputs = one_hot.mean(0).expand(len(labels.val.labels), -1)
    return ProbeResult(scores_of(labels, outputs), outputs)


def linear(features: FrozenFeatures) -> ProbeResult:
    """Ridge regression on means."""
    labels = features.labels
    ridge = Ridge.fit(features.train_means(), _targets(labels, labels.train.labels))
    outputs = torch.stack([ridge(view) for view in features.val_means().unbind(1)]).mean(0)
    return ProbeResult(scores_of(labels, outputs), outputs)


def knn(features: FrozenFeatures) -> ProbeResult:
    """Nearest neighbours on means."""
    labels, x, own = features.labels, features.train_means(), features.labels.train.labels
    targets = _targets(labels, own)
    tried = [k for k in NEIGHBOURS if k < len(x)]
    similarity, numbers = nearest(x, x, max(tried), excluded=True)
    inner = replace(labels, val=replace(labels.train, labels=own))
    quality = {k: main_score(scores_of(inner, vote(similarity[:, :k], numbers[:, :k], targets))) for k in tried}
    best = max(tried, key=lambda k: quality[k])
    outputs = torch.stack([vote(*nearest(x, view, best), targets) for view in features.val_means().unbind(1)]).mean(0)
    details = {"neighbours": best, "leave_one_out_by_neighbours": quality}
    return ProbeResult(scores_of(labels, outputs), outputs, details)


def attentive(
    features: FrozenFeatures, settings: ProbeSettings, device: torch.device, report: Callable[[int, float], None]
) -> ProbeResult:
    """A grid of attentive probes.

    Args:
        features: of both splits, with all tokens.
        settings: how they are trained.
        device: where they are trained.
        report: called after every epoch with its number from 1 and the best score of a head.
    """
    labels = features.labels
    own = labels.train.labels
    centre, spread = torch.zeros(1), torch.ones(1)
    if labels.task == "regression":
        centre, spread = own.float().mean(0), own.float().std(0, unbiased=False)
        own = (own.float() - centre) / spread
    num_tokens, dim = features.train_tokens(0, [0]).shape[1:]
    grid = HeadGrid.start(
        len(settings.heads), dim, settings.num_heads, labels.num_outputs, settings.depth, settings.seed
    ).to(device)
    together = grid.samples_together(num_tokens, device)
    history = History()
    best: list[dict[str, Any]] = []
    outputs = torch.empty(0)

    def load(epoch: int, numbers: Sequence[int]) -> Tensor:
        return features.train_tokens(epoch, numbers).to(device)

    def after_epoch(epoch: int, losses: list[float]) -> None:
        nonlocal best, outputs
        outputs = predict(
            grid,
            lambda numbers: features.val_tokens(numbers).to(device),
            len(labels.val.labels),
            together,
            labels.task == "classification",
        )
        outputs = outputs if labels.task == "classification" else outputs * spread + centre
        best = [scores_of(labels, one) for one in outputs]
        history.train_loss.append(losses)
        history.val_score.append([main_score(scores) for scores in best])
        report(epoch + 1, max(history.val_score[-1]))

    optimizer = GridAdamW(grid, settings.decay_all, settings.clip_norm)
    train_grid(
        grid,
        settings.heads,
        load,
        own.to(device),
        settings.epochs,
        settings.batch_size,
        settings.seed,
        optimizer,
        after_epoch,
        together,
    )
    winner = max(range(len(grid)), key=lambda head: history.val_score[-1][head])
    heads = [
        {"lr": one.lr, "weight_decay": one.weight_decay, "train_loss": loss, "scores": scores}
        for one, loss, scores in zip(settings.heads, history.train_loss[-1], best, strict=True)
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
    return ProbeResult(
        best[winner], outputs[winner], details, history, [grid.state_dict(head) for head in range(len(grid))]
    )


def confusion_of(labels: Labels, outputs: Tensor) -> Tensor:
    """int64 [C, C] on the validation set: rows are the truth."""
    return confusion(outputs.argmax(1), labels.val.labels, len(labels.classes))


def _targets(labels: Labels, own: Tensor) -> Tensor:
    """float64 [N, C]."""
    return F.one_hot(own, len(labels.classes)).double() if labels.task == "classification" else own
