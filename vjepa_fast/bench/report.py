"""The result of `vjepa-fast bench` as a page and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vjepa_fast.labels import PARTS, backward_of

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
        f"# {report['workload']['name']}, {about['device']}", "",
        f"- hardware: {about['device']}, {about['cpu']}, {about['cores']} cores; load average "
        f"{about['load_average']:.2f} before, {report['load_average_after']:.2f} after",
        f"- measured limits: copy {limits['bytes_per_s'] / 1e9:.4g} GB/s, {limits['dtype']} matrix product {rate}",
        f"- versions: python {about['python']}, torch {about['torch']}, triton {about['triton']}, vjepa_fast "
        f"{about['vjepa_fast']}{commit}{changed}",
        f"- command: `{about['command']}`", f"- date: {about['date']}", "",
    ]
    if about["device"].startswith("CPU"):
        lines += ["Measured on a CPU: it says nothing about a GPU.", ""]
    lines += _step_lines(report)
    if "loader" in report:
        lines += ["", f"Loader, {report['loader']['manifest']}:", "",
                  "| | workers | clips/s | core-ms a clip |", "|---|---|---|---|"]
        for name, info in report["loader"]["figures"].items():
            core = f"{info['core_ms_per_clip']:.1f}" if "core_ms_per_clip" in info else ""
            lines.append(f"| {name} | {info['num_workers']} | {info['clips_per_s']:.1f} | {core} |")
    return "\n".join(lines) + "\n"


def _graphed_line(info: dict[str, Any]) -> str:
    if "error" in info:
        return f"As CUDA graphs: {info['error']}"
    return (f"As CUDA graphs ({info['num_buckets']} of them): {info['p50'] * 1e3:.1f} ms a step, "
            f"{info['clips_per_s']:.2f} clips/s; in turns with it the eager step takes "
            f"{info['eager_over_graphed']['p50']:.2f} times as long. Their warm-up took {info['warm_up_s']:.1f} s.")


def _step_lines(report: dict[str, Any]) -> list[str]:
    work = report["workload"]
    lines = [
        f"{work['model']}, {work['num_frames']} frames of {work['crop_size']} px, batch {work['batch_size']}, "
        f"{work['dtype']}: forward, backward, AdamW and EMA, masks drawn",
        "beforehand. Times are medians with quantiles 20 to 80.",
    ]
    if report.get("reference"):
        lines += ["Both sides take turns step by step on the same weights, clips and masks; the ratio is the median of",
                  "the ratios of neighbouring steps. Unseen shapes: the first pass over the batches. The reference's",
                  "clips are normalised beforehand, ours in the step."]
    lines += ["", "| | ms | clips/s | model TFLOP/s (of matrix product rate) | unseen shapes, ms | our speed-up |",
              "|---|---|---|---|---|---|"]
    for name, info in sides(report).items():
        ratio = info.get("over_ours")
        text = "" if ratio is None else f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        lines.append(
            f"| {name} | {info['p50'] * 1e3:.1f} ({info['p20'] * 1e3:.1f} to {info['p80'] * 1e3:.1f}) | "
            f"{info['clips_per_s']:.2f} | {info['model_tflop_per_s']:.3g} "
            f"({100 * info['share_of_matmul_rate']:.0f} %) | {info['unseen_shapes']['p50'] * 1e3:.1f} | {text} |")
    for name, info in report.get("reference", {}).items():
        if "error" in info:
            lines.append(f"| {name} | {info['error']} | | | | |")
    if "graphed" in report["step"]:
        lines += ["", _graphed_line(report["step"]["graphed"])]
    by_part = report["step"]["profile"]["ms_by_part"]
    total = sum(by_part.values())
    lines += ["", "Our step by part, under the profiler:", "", "| part | ms | share |", "|---|---|---|"]
    lines += [f"| {part} | {by_part[part]:.2f} | {100 * by_part[part] / total:.1f} % |" for part in _parts(by_part)]
    return lines


def _parts(by_part: dict[str, float]) -> list[str]:
    order = [name for part in PARTS for name in (part, backward_of(part))] + ["other"]
    return [name for name in order if name in by_part]


def draw(report: dict[str, Any], out: Path) -> None:
    """A picture: the time of a step of every side, and our step by part."""
    # Not through pyplot, which would look for a display.
    from matplotlib.figure import Figure

    found, by_part = sides(report), report["step"]["profile"]["ms_by_part"]
    parts = _parts(by_part)
    figure = Figure(figsize=(11, 1.8 + 0.36 * max(2 * len(found), len(parts))), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(found)[::-1]
    middle = [found[name]["p50"] * 1e3 for name in names]
    spread = [[(found[name]["p50"] - found[name]["p20"]) * 1e3 for name in names],
              [(found[name]["p80"] - found[name]["p50"]) * 1e3 for name in names]]
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
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    work = report["workload"]
    figure.suptitle(f"{work['name']}, batch {work['batch_size']}, {work['dtype']}, {report['environment']['device']}",
                    fontsize=11)
    figure.savefig(out, dpi=130)
