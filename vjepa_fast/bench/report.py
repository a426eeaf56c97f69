"""Renders the result of `vjepa-fast bench` as a page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vjepa_fast.bench.loader import backend_name
from vjepa_fast.common import markdown
from vjepa_fast.common.profiler_labels import PARTS, backward_of

_COLOURS = {"ours": "#2a6fbb", "reference": "#b8b8b8"}


def sides(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of ours, then of every setting of the reference that ran."""
    found = {name: info for name, info in report.get("reference", {}).items() if "error" not in info}
    return {"vjepa-fast": report["step"]["figures"], **found}


def as_markdown(report: dict[str, Any]) -> str:
    """A page for people."""
    about, limits = report["environment"], report["limits"]
    rate = f"{limits['flops_per_s'] / 1e12:.3g} TFLOP/s"
    commit = f", commit {about['commit']}" if about["commit"] else ""
    changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
    lines = [
        f"# {report['workload']['name']}, {about['device']}",
        "",
        f"- hardware: {about['device']}, {about['cpu']}, {about['cores']} cores; load average "
        f"{about['load_average']:.2f} before, {report['load_average_after']:.2f} after",
        f"- measured limits: copy {limits['bytes_per_s'] / 1e9:.4g} GB/s, {limits['dtype']} matrix product {rate}",
        f"- versions: python {about['python']}, torch {about['torch']}, triton {about['triton']}, vjepa_fast "
        f"{about['vjepa_fast']}{commit}{changed}",
        f"- command: `{about['command']}`",
        f"- date: {about['date']}",
        "",
    ]
    if about["device"].startswith("CPU"):
        lines += ["Measured on a CPU: it says nothing about a GPU.", ""]
    lines += _step_lines(report)
    if "loader" in report:
        lines += ["", *_loader_lines(report["loader"], about["device"].startswith("CPU"))]
    return "\n".join(lines) + "\n"


def _loader_lines(loader: dict[str, Any], on_cpu: bool) -> list[str]:
    lines = [
        f"Loader, {loader['manifest']}. The step takes {loader['step_ms_per_clip']:.1f} ms a clip, so it needs "
        f"{loader['step_clips_per_s']:.1f} clips/s.",
        "",
        *markdown.table(
            ["from", "by", "decoding processes", "clips/s", "core-ms a clip", _waits(on_cpu), ""],
            map(_loader_row, loader["rows"]),
        ),
    ]
    if "sample" in loader:
        found = loader["sample"]
        lines += [
            "",
            f"{found['num_used']} videos were read, of {found['num_listed']} in the list; "
            f"{found['num_broken']} that were tried cannot be read.",
        ]
    if "pack" in loader:
        made = loader["pack"]
        lines += [
            f"The pack was made of {made['num_videos']} of them: {made['fps']:g} frames/s, shorter side "
            f"{made['short_side']}, quality {made['quality']}; {made['num_bytes'] / made['source_bytes']:.2f} of "
            f"their bytes, {made['psnr']:.1f} dB."
        ]
    return lines


def _loader_row(row: dict[str, Any]) -> list[object]:
    what = [row["format"], backend_name(row)]
    if "error" in row:
        return [*what, "", "", "", "", row["error"].splitlines()[0]]
    rates = (f"{row['clips_per_s']:.1f}", f"{row['core_ms_per_clip']:.1f}", f"{100 * row['waits']:.1f} %")
    return [*what, row["num_workers"], *rates, "; ".join(row["notes"])]


def _waits(on_cpu: bool) -> str:
    return "decoding's share of the cores' time" if on_cpu else "the step would wait"


def _graphed_line(info: dict[str, Any]) -> str:
    if "error" in info:
        return f"As CUDA graphs: {info['error']}"
    return (
        f"As CUDA graphs ({info['num_buckets']} of them): {info['p50'] * 1e3:.1f} ms a step, "
        f"{info['clips_per_s']:.2f} clips/s; in turns with it the eager step takes "
        f"{info['eager_over_graphed']['p50']:.2f} times as long. Their warm-up took {info['warm_up_s']:.1f} s."
    )


def _step_lines(report: dict[str, Any]) -> list[str]:
    work = report["workload"]
    lines = [
        f"{work['model']}, {work['num_frames']} frames of {work['crop_size']} px, batch {work['batch_size']}, "
        f"{work['dtype']}: forward, backward, AdamW and EMA, masks drawn",
        "beforehand. Times are medians with quantiles 20 to 80.",
    ]
    if report.get("reference"):
        lines += [
            "Both sides take turns step by step on the same weights, clips and masks; the ratio is the median of",
            "the ratios of neighbouring steps. Unseen shapes: the first pass over the batches. The reference's",
            "clips are normalised beforehand, ours in the step.",
        ]
    rows = [_step_row(name, info) for name, info in sides(report).items()]
    rows += [[name, info["error"]] for name, info in report.get("reference", {}).items() if "error" in info]
    head = ["", "ms", "clips/s", "model TFLOP/s (of matrix product rate)", "unseen shapes, ms", "our speed-up"]
    lines += ["", *markdown.table(head, rows)]
    if "graphed" in report["step"]:
        lines += ["", _graphed_line(report["step"]["graphed"])]
    by_part = report["step"]["profile"]["ms_by_part"]
    total = sum(by_part.values())
    shares = [(part, f"{by_part[part]:.2f}", f"{100 * by_part[part] / total:.1f} %") for part in _parts(by_part)]
    lines += ["", "Our step by part, under the profiler:", "", *markdown.table(["part", "ms", "share"], shares)]
    return lines


def _step_row(name: str, info: dict[str, Any]) -> list[str]:
    ratio = info.get("over_ours")
    return [
        name,
        f"{info['p50'] * 1e3:.1f} ({info['p20'] * 1e3:.1f} to {info['p80'] * 1e3:.1f})",
        f"{info['clips_per_s']:.2f}",
        f"{info['model_tflop_per_s']:.3g} ({100 * info['share_of_matmul_rate']:.0f} %)",
        f"{info['unseen_shapes']['p50'] * 1e3:.1f}",
        "" if ratio is None else f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})",
    ]


def _parts(by_part: dict[str, float]) -> list[str]:
    order = [name for part in PARTS for name in (part, backward_of(part))] + ["other"]
    return [name for name in order if name in by_part]


def draw(report: dict[str, Any], out: Path) -> None:
    """A picture: the time of a step of every side, our step by part, and what the loader gives."""
    # Not through pyplot, which would look for a display.
    from matplotlib.figure import Figure

    found, by_part = sides(report), report["step"]["profile"]["ms_by_part"]
    parts = _parts(by_part)
    rows = [row for row in report.get("loader", {}).get("rows", []) if "error" not in row]
    size = 16 if rows else 11, 1.8 + 0.36 * max(2 * len(found), len(parts))
    figure = Figure(figsize=size, layout="constrained")
    left, right, *others = figure.subplots(1, 3 if rows else 2)
    names = list(found)[::-1]
    middle = [found[name]["p50"] * 1e3 for name in names]
    spread = [
        [(found[name]["p50"] - found[name]["p20"]) * 1e3 for name in names],
        [(found[name]["p80"] - found[name]["p50"]) * 1e3 for name in names],
    ]
    colours = [_COLOURS["ours" if name == "vjepa-fast" else "reference"] for name in names]
    left.barh(names, middle, xerr=spread, color=colours, ecolor="#444444", capsize=3, height=0.6)
    highest = max(m + s for m, s in zip(middle, spread[1], strict=True))
    for place, name in enumerate(names):
        ratio = found[name].get("over_ours")
        text = f"{middle[place]:.4g} ms" + (f", {ratio['p50']:.2f} x ours" if ratio else "")
        left.text(middle[place] + spread[1][place] + 0.02 * highest, place, text, va="center", fontsize=9)
    left.set_xlim(0, 1.7 * highest)
    left.set_ylim(-1, len(names))
    left.set_xlabel("ms a step (median, quantiles 20 to 80)")
    right.barh(parts[::-1], [by_part[part] for part in parts[::-1]], color=_COLOURS["ours"], height=0.6)
    right.set_xlabel("ms of our step by part, under the profiler")
    for axes in others:
        _draw_loader(axes, report["loader"], rows)
    for axes in (left, right, *others):
        axes.spines[["top", "right"]].set_visible(False)
    work = report["workload"]
    figure.suptitle(
        f"{work['name']}, batch {work['batch_size']}, {work['dtype']}, {report['environment']['device']}", fontsize=11
    )
    figure.savefig(out, dpi=130)


def _draw_loader(axes: Any, loader: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    names = [f"{row['format']}, {backend_name(row)}" for row in rows[::-1]]
    rates = [row["clips_per_s"] for row in rows[::-1]]
    axes.barh(names, rates, color=_COLOURS["ours"], height=0.6)
    for place, (rate, row) in enumerate(zip(rates, rows[::-1], strict=True)):
        axes.text(rate, place, f" {rate:.3g}, {row['core_ms_per_clip']:.3g} core-ms a clip", va="center", fontsize=9)
    axes.axvline(loader["step_clips_per_s"], color="#444444", linestyle="--", label="what the step needs")
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set_xlim(0, 1.7 * max(*rates, loader["step_clips_per_s"]))
    axes.set_ylim(-1, len(names))
    axes.set_xlabel("clips/s of the loader")
