"""`vjepa-fast probe` on labelled videos: computes features, trains probes, reports scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vjepa_fast.cli.console import say
from vjepa_fast.common.progress_bar import Bar

if TYPE_CHECKING:
    import torch

    from vjepa_fast.evaluation.labels import Labels
    from vjepa_fast.evaluation.probes import Probe, ProbeResult, ProbeSettings
    from vjepa_fast.evaluation.views import ClipRule
    from vjepa_fast.inference.model import InferenceModel


class ProbeRun:
    """One run of the command on labelled videos: `features`, then `probe`."""

    def __init__(
        self,
        model: InferenceModel,
        labels: Labels,
        settings: ProbeSettings,
        device: torch.device,
        out: Path,
        probes: Mapping[str, Probe],
    ) -> None:
        self._model, self._labels, self._settings = model, labels, settings
        self._device, self._out, self._probes = device, out, probes

    def features(self, cache: Path | None, rule: ClipRule, batch: int, num_workers: int) -> None:
        """What probes are fitted on, from the disk or computed."""
        from vjepa_fast.common.cache_dir import default_cache_dir
        from vjepa_fast.evaluation.features import FeatureStore, FillProgress
        from vjepa_fast.evaluation.run_probes import FrozenFeatures

        store = FeatureStore(cache or default_cache_dir() / "features", self._model)
        self._features = FrozenFeatures(store, self._labels, rule, self._settings)
        self._rule = rule
        bar: Bar | None = None

        def report(now: FillProgress) -> None:
            nonlocal bar
            bar = bar or Bar("encoded", "videos", now.total, now.kept)
            bar.show(now.done, f"{len(now.broken)} broken")

        try:
            progress = self._features.fill(
                self._model, self._device, list(self._probes.values()), batch, num_workers, report
            )
        except KeyboardInterrupt:
            say("warning", "the features computed so far are kept; run the same command to continue")
            raise
        finally:
            if bar is not None:
                bar.close()
        if progress.broken:
            path, reason = next(iter(progress.broken.items()))
            several = len(progress.broken) > 1
            say(
                "warning",
                f"{len(progress.broken)} video{'s' if several else ''} could not be read and "
                f"{'are' if several else 'is'} left out ({path}: {reason}{', ...' if several else ''})",
            )
        if progress.kept:
            typer.echo(
                f"features of {progress.kept} of {progress.total} videos were there already: {store.folder}", err=True
            )
        self._store = store

    def probe(self, head: dict[str, Any]) -> None:
        """Fit, measure, write and show.

        Args:
            head: what results.json begins with.
        """
        from vjepa_fast.common.atomic import disk_errors
        from vjepa_fast.evaluation import report
        from vjepa_fast.evaluation.metrics import main_score
        from vjepa_fast.evaluation.probes import BASELINE

        labels, out = self._features.labels, self._out
        results = self._fit()
        with disk_errors(out, advice="give the command once more"):
            out.mkdir(parents=True, exist_ok=True)
        best = max((name for name in results if name != BASELINE), key=lambda name: main_score(results[name].scores))
        for result in results.values():
            if result.write_files is not None:
                result.write_files(out)
        if labels.task == "classification":
            report.draw_confusion(out / report.CONFUSION, labels, results[best].outputs, best)
        else:
            report.draw_scatter(out / report.SCATTER, labels, results[best].outputs, results[best].scores, best)
        probes = {name: {"scores": one.scores, **one.details} for name, one in results.items()}
        # Last, as it says that a folder is whole.
        report.write_json(out, {**head, **self._described(), "best": best, "probes": probes})
        _show(labels, results)
        typer.echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")

    def _fit(self) -> dict[str, ProbeResult]:
        from vjepa_fast.evaluation.run_probes import fit_probes

        bar: Bar | None = None

        def report(done: int, total: int, text: str) -> None:
            nonlocal bar
            bar = bar or Bar("trained", "epochs", total)
            bar.show(done, text)

        try:
            return fit_probes(self._probes, self._features, self._settings, self._device, report)
        finally:
            if bar is not None:
                bar.close()

    def _described(self) -> dict[str, Any]:
        """What was measured, and how, for results.json."""
        labels = self._features.labels
        splits = {
            name: {"manifest": split.name, "videos": len(split.videos.paths)}
            for name, split in (("train", labels.train), ("val", labels.val))
        }
        return {
            "encoder": self._store.hash,
            "device": str(self._device),
            "task": labels.task,
            **splits,
            "classes": labels.classes,
            "targets": labels.targets,
            "clips": {key: value for key, value in asdict(self._rule).items() if key not in ("version", "seed")},
            "broken": self._features.broken,
            "seed": self._settings.seed,
        }


def _show(labels: Labels, results: Mapping[str, ProbeResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    scores = next(iter(results.values())).scores
    names = [name for name, value in scores.items() if isinstance(value, float)]
    by_target = labels.targets if labels.task == "regression" and len(labels.targets) <= 6 else []
    table = Table(
        title=f"{len(labels.train.videos.paths)} training and {len(labels.val.videos.paths)} validation "
        "videos; 1 is perfect"
    )
    table.add_column("probe")
    for name in (*(name.replace("_", " ") for name in names), *(f"r2 of {target}" for target in by_target)):
        table.add_column(name, justify="right")
    for result in results.values():
        values = [result.scores[key] for key in names]
        values += [result.scores["r2_by_target"][target] for target in by_target]
        table.add_row(result.title, *(f"{value:.3f}" for value in values))
    Console().print(table)
