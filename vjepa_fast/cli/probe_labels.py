"""`vjepa-fast probe` on labelled videos: features, probes, and what they scored."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vjepa_fast.cli.bar import Bar
from vjepa_fast.cli.console import say

if TYPE_CHECKING:
    from vjepa_fast.evaluation.labels import Labels
    from vjepa_fast.evaluation.run_probes import ProbeResult, ProbeSettings
    from vjepa_fast.inference.model import InferenceModel


class ProbeRun:
    """One run of the command on labelled videos: `features`, then `probe`."""

    def __init__(self, model: InferenceModel, labels: Labels, settings: ProbeSettings, device: Any, out: Path) -> None:
        self._model, self._labels, self._settings = model, labels, settings
        self._device, self._out = device, out

    def features(self, cache: Path | None, rule: Any, kinds: list[str], batch: int, num_workers: int) -> None:
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
            progress = self._features.fill(self._model, self._device, kinds, batch, num_workers, report)
        except KeyboardInterrupt:
            say("warning", "the features computed so far are kept; the same command goes on")
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

    def probe(self, kinds: list[str], head: dict[str, Any]) -> None:
        """Fit, measure, write and show."""
        from vjepa_fast.common.atomic import disk_errors
        from vjepa_fast.evaluation import report, run_probes

        labels = self._features.labels
        results: dict[str, ProbeResult] = {"baseline": run_probes.baseline(labels)}
        if "linear" in kinds:
            results["linear"] = run_probes.linear(self._features)
        if "knn" in kinds:
            results["knn"] = run_probes.knn(self._features)
        if "attentive" in kinds:
            score = "accuracy" if labels.task == "classification" else "R2"
            bar = Bar("trained", "epochs", self._settings.epochs)
            try:
                results["attentive"] = run_probes.attentive(
                    self._features,
                    self._settings,
                    self._device,
                    lambda epoch, best: bar.show(epoch, f"best {score} {best:.3f}"),
                )
            finally:
                bar.close()
        with disk_errors(self._out, advice="give the command once more"):
            self._out.mkdir(parents=True, exist_ok=True)
        best = max(
            (name for name in results if name != "baseline"),
            key=lambda name: run_probes.main_score(results[name].scores),
        )
        if "attentive" in results:
            report.draw_curves(
                self._out / report.CURVES, results["attentive"], "top1" if labels.task == "classification" else "r2"
            )
        if labels.task == "classification":
            report.draw_confusion(self._out / report.CONFUSION, labels, results[best].outputs, best)
        else:
            report.draw_scatter(self._out / report.SCATTER, labels, results[best].outputs, results[best].scores, best)
        splits = {
            name: {"manifest": split.name, "videos": len(split.videos.paths)}
            for name, split in (("train", labels.train), ("val", labels.val))
        }
        rule = {key: value for key, value in asdict(self._rule).items() if key not in ("version", "seed")}
        report.write_results(
            self._out,
            {
                **head,
                "encoder": self._store.hash,
                "device": str(self._device),
                "task": labels.task,
                **splits,
                "classes": labels.classes,
                "targets": labels.targets,
                "clips": rule,
                "broken": self._features.broken,
                "seed": self._settings.seed,
                "best": best,
            },
            labels,
            results,
        )
        _show(labels, results)
        typer.echo(f"{self._out}: {', '.join(sorted(path.name for path in self._out.iterdir()))}")


def _show(labels: Labels, results: dict[str, ProbeResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = results["baseline"].scores
    names = [name for name, value in first.items() if isinstance(value, float)]
    by_target = labels.targets if labels.task == "regression" and len(labels.targets) <= 6 else []
    table = Table(
        title=f"{len(labels.train.videos.paths)} training and {len(labels.val.videos.paths)} validation "
        "videos; 1 is perfect"
    )
    table.add_column("probe")
    for name in (*(name.replace("_", " ") for name in names), *(f"r2 of {target}" for target in by_target)):
        table.add_column(name, justify="right")
    said = {"baseline": "the training labels alone", "linear": "linear, mean features"}
    for name, result in results.items():
        if name == "attentive":
            one = result.details["heads"][result.details["best_head"]]
            said[name] = (
                f"attentive, depth {result.details['depth']}, best of {len(result.details['heads'])} "
                f"(lr {one['lr']:g}, decay {one['weight_decay']:g})"
            )
        elif name == "knn":
            said[name] = f"{result.details['neighbours']} nearest, mean features"
        values = [result.scores[key] for key in names]
        values += [result.scores["r2_by_target"][target] for target in by_target]
        table.add_row(said[name], *(f"{value:.3f}" for value in values))
    Console().print(table)
