"""Runs a frozen evaluation from two manifests: features, probes, scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vjepa_fast.evaluation.features import MEAN, TOKENS, Entry, FeatureStore, FillProgress, entries_of
from vjepa_fast.evaluation.labels import Labels
from vjepa_fast.evaluation.metrics import scores_of
from vjepa_fast.evaluation.probes import BASELINE, Probe, ProbeResult, ProbeSettings
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference.model import InferenceModel


class FrozenFeatures:
    """Features of both splits, without the videos that cannot be read.

    Args:
        store: where they are kept.
        labels: of both splits.
        rule: how a video becomes clips; its views are those of validation, training has one.
        settings: of the probes, for augmented versions.
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
        probes: Sequence[Probe],
        batch_size: int,
        num_workers: int,
        report: Callable[[FillProgress], None],
    ) -> FillProgress:
        """Compute what is missing for some probes; see FeatureStore.fill.

        Raises:
            UserError: the disk is full, or the videos of a split that can be read are too few.
        """
        # A video that is in both manifests is one entry where the rules agree.
        entries: dict[str, Entry] = {}
        whole: set[str] = set()
        if any(probe.reads == "tokens" for probe in probes):
            entries |= {entry.key: entry for own in (*self._train, self._val) for entry in own}
            whole = set(entries)
        if any(probe.reads == "means" for probe in probes):
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


def baseline(labels: Labels) -> ProbeResult:
    """What knowing the training labels alone is worth: their frequencies, or their mean."""
    outputs = labels.as_numbers(labels.train.labels).mean(0).expand(len(labels.val.labels), -1)
    return ProbeResult("the training labels alone", scores_of(labels, outputs), outputs)


def fit_probes(
    probes: Mapping[str, Probe],
    features: FrozenFeatures,
    settings: ProbeSettings,
    device: torch.device,
    report: Callable[[int, int, str], None],
) -> dict[str, ProbeResult]:
    """The baseline and the results of probes by name; those on means first, as they take seconds.

    Args:
        probes: by name.
        features: filled for these probes.
        settings, device, report: as in `Probe.fit`.
    """
    results = {BASELINE: baseline(features.labels)}
    for name, probe in sorted(probes.items(), key=lambda one: one[1].reads == "tokens"):
        results[name] = probe.fit(features, settings, device, report)
    return results
