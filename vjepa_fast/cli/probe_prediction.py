"""`vjepa-fast probe --task horizon` and `--task surprise`: evaluates the predictor."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from vjepa_fast.cli.console import say
from vjepa_fast.common.progress_bar import Bar

if TYPE_CHECKING:
    import torch

    from vjepa_fast.cli.probe_options import ProbeOptions
    from vjepa_fast.evaluation.prediction import Prediction
    from vjepa_fast.evaluation.views import ClipRule
    from vjepa_fast.inference.videos import Videos


def run_prediction(
    options: ProbeOptions,
    model: Prediction,
    videos: Videos,
    rule: ClipRule,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    checkpoint: str,
) -> None:
    """Measure, write and show.

    Args:
        options: of the command; --stride is by default one window of a video for `horizon`, and half a window for
            `surprise`.
        model: on the CPU.
        videos: of --val.
        rule: frames, rate and size of a window.
        device: where the model runs.
        batch_size: clips together.
        num_workers: decoding processes.
        checkpoint: what results.json calls it.
    """
    from vjepa_fast.common.atomic import disk_errors
    from vjepa_fast.evaluation import horizon, report, surprise

    surprised = options.task == "surprise"
    all_labels = surprise.read_anomalies(options.val, videos) if surprised else None
    stride = options.stride or (max(1, rule.frames // 2) if surprised else None)
    found, broken = _measure(options.task, model, videos, rule, stride, device, batch_size, num_workers)
    order = sorted(found)
    values = [found[number] for number in order]
    tubelet = model.context.encoder.tubelet_size
    clips = {key: value for key, value in asdict(rule).items() if key in ("frames", "fps", "frame_step", "size")}
    content = {
        "checkpoint": checkpoint,
        "dtype": options.dtype,
        "device": str(device),
        "command": sys.argv[1:],
        "task": options.task,
        "val": {"manifest": options.val, "videos": len(order)},
        "clips": {**clips, "context": model.context_tubelets * tubelet, "stride": stride},
        "broken": broken,
        "encoders": {"context": model.context.weights, "target": model.target.weights},
    }
    out = options.out
    with disk_errors(out, advice="give the command once more"):
        out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{options.task}.png"
    if all_labels is None:
        scores = horizon.horizon_scores(values, tubelet / rule.fps if rule.fps else None)
        horizon.draw_horizon(picture, scores)
        _show_horizon(scores)
    else:
        labels = all_labels[order]
        if options.pairs and broken:
            say("warning", "pairs are left out where videos are missing, as it is unknown which belong together")
        scores = surprise.surprise_scores(values, labels, options.pairs and not broken)
        content["by_video"] = {
            videos.names[number]: {"label": int(label), **found[number]}
            for number, label in zip(order, labels.tolist(), strict=True)
        }
        surprise.draw_surprise(picture, values, labels, scores)
        _show_surprise(scores)
    report.write_json(out, {**content, "scores": scores})
    typer.echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _measure(
    task: str,
    model: Prediction,
    videos: Videos,
    rule: ClipRule,
    stride: int | None,
    device: torch.device,
    batch_size: int,
    num_workers: int,
) -> tuple[dict[int, Any], dict[str, str]]:
    """Errors (horizon) or surprise by the number of the video, and why videos are left out, by path."""
    from vjepa_fast.evaluation.prediction import errors_of_videos
    from vjepa_fast.evaluation.surprise import surprise

    bar = Bar("measured", "videos", len(videos.paths))
    broken: dict[str, str] = {}
    found: dict[int, Any] = {}
    try:
        for number, errors in errors_of_videos(
            videos,
            rule,
            stride,
            lambda: model.to(device),
            batch_size,
            num_workers,
            lambda done, broken: bar.show(done, f"{len(broken)} broken"),
            broken,
        ):
            found[number] = errors if task == "horizon" else surprise(errors)
    finally:
        bar.close()
    if broken:
        path, reason = next(iter(broken.items()))
        say(
            "warning",
            f"{len(broken)} of {len(videos.paths)} videos were left out ({path}: {reason}"
            f"{', ...' if len(broken) > 1 else ''})",
        )
    return found, broken


def _show_horizon(scores: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Future features of {scores['videos']} videos, L1 distance (0 is perfect)")
    rows = scores["by_horizon"]
    for name in (
        "seconds ahead" if "seconds" in rows[0] else "tubelets ahead",
        "predicted",
        "last copied",
        "mean of the past",
        "predicted / copied",
        "videos nearer than copied",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        ahead = f"{row['seconds']:.2f}" if "seconds" in row else str(row["tubelet"])
        table.add_row(
            ahead,
            *(f"{row[key]:.4f}" for key in ("predicted", "copied", "averaged")),
            f"{row['ratio']:.3f}",
            f"{100 * row['share_nearer']:.0f} %",
        )
    table.add_row("all", "", "", "", f"{scores['ratio']:.3f}", f"{100 * scores['share_nearer']:.0f} %")
    Console().print(table)


def _show_surprise(scores: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vjepa_fast.evaluation.surprise import REDUCTIONS

    table = Table(
        title=f"{scores['anomalies']} of {scores['videos']} videos are impossible: area under the ROC curve "
        "(95 %), 0.5 is chance"
    )
    table.add_column("error of")
    for how in REDUCTIONS:
        table.add_column(how, justify="right")
    for kind, name in (("predicted", "predicted features"), ("copied", "copied features (motion)")):
        own = scores["auc"][kind]
        table.add_row(
            name, *(f"{own[how]['auc']:.3f} ({own[how]['low']:.2f} to {own[how]['high']:.2f})" for how in REDUCTIONS)
        )
        if own[REDUCTIONS[0]].get("paired_accuracy") is not None:
            table.add_row("  pairs told apart", *(f"{own[how]['paired_accuracy']:.3f}" for how in REDUCTIONS))
    Console().print(table)
