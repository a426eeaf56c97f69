"""The table that ends a run of benchmarks.gpu_run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vjepa_fast.cost import check


def as_table(report: dict[str, Any]) -> str:
    """A few lines for the end of the output."""
    lines = [f"{name:20s} {part['seconds']:6.1f} s  {part['error'] or 'ok'}" for name, part in report.items()]
    results = {name: part["result"] or {} for name, part in report.items()}
    about = results["environment"]
    lines += [
        "",
        f"{about.get('device')}, torch {about.get('torch')}, triton {about.get('triton')}, libnvcuvid "
        f"{about.get('libnvcuvid')}, commit {about.get('commit')}",
    ]
    if "limits" in results["floors"]:
        found = results["floors"]["limits"]
        lines.append(
            f"copy {found['bytes_per_s'] / 1e12:.3f} TB/s, {found['dtype']} matrix product "
            f"{found['flops_per_s'] / 1e12:.1f} TFLOP/s"
        )
    lines += [*_operations(results["operations"]), *_steps(results), *_graphs_and_profile(results)]
    return "\n".join(lines)


def _operations(operations: dict[str, Any]) -> Iterator[str]:
    for name, info in operations.items():
        cells = [
            f"{info[key]:9.4g} {unit}"
            for key, unit in (
                ("ms_p50", "ms"),
                ("gb_per_s", "GB/s"),
                ("tflop_per_s", "TFLOP/s"),
                ("percent_of_limit", "% of limit"),
                ("clips_per_s", "clips/s"),
            )
            if key in info
        ]
        yield f"{name:42s}" + "  ".join(cells)


def _steps(results: dict[str, Any]) -> Iterator[str]:
    for part in ("step", "options", "reference", "few", "reference_compiled"):
        for name, info in results.get(part, {}).items():
            if isinstance(info, dict) and "error" in info:
                yield (f"{part}: {name:34s} {info['error'].splitlines()[0][:120]}")
            if isinstance(info, dict) and "clips_per_s" in info:
                ratio = info.get("over_ours", {}).get("p50")
                free, unseen = info.get("free_running_clips_per_s"), info["unseen_shapes"]["p50"]
                yield (
                    f"{part}: {name:34s} {info['p50'] * 1e3:8.1f} ms (unseen shapes {unseen * 1e3:.1f})  "
                    f"{info['clips_per_s']:7.1f} clips/s  {100 * info['share_of_matmul_rate']:5.1f} % of matmul"
                    + (f"  {ratio:.2f} x our time" if ratio else "")
                    + (f"  {free:.1f} clips/s running free" if free else "")
                    + (f"  {info['peak_memory_gib']:.1f} GiB" if info.get("peak_memory_gib") else "")
                    + (f"  first step {info['first_step_s']:.1f} s" if "first_step_s" in info else "")
                )


def _graphs_and_profile(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    graphed = results["graphed"]
    if "error" in graphed:
        lines.append(f"graphed: {graphed['error']}")
    elif graphed:
        lines.append(
            f"graphed: {graphed['eager']['p50'] * 1e3:.1f} ms eagerly, {graphed['p50'] * 1e3:.1f} ms as "
            f"{graphed['num_buckets']} CUDA graphs, {graphed['clips_per_s']:.1f} clips/s"
        )
    if "ms_by_kind" in results["profile"]:
        lines.append(
            "profile, ms a step: "
            + ", ".join(f"{kind} {ms:.1f}" for kind, ms in results["profile"]["ms_by_kind"].items())
        )
        lines += [
            f"  {op['ms']:8.2f} ms {op['calls']:6d} x {op['name']}" for op in results["profile"]["operators"][:12]
        ]
    if "predicted_ms_by_part" in results["profile"]:
        found = results["profile"]
        lines.append(check.as_table(check.compare(found["predicted_ms_by_part"], found["ms_by_part"])))
    return lines
