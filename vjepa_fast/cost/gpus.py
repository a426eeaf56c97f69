"""GPUs by name: data sheet rates, and the share of them that kernels reach, assumed or measured.

Assumed until measured on the machine (each replaced by `with_measured`):
- matrix products reach 80 % of the data sheet's dense bf16 rate (790 of 989 TFLOP/s on a Hopper);
- memory-bound kernels reach 90 % of the bandwidth (quack's media/2025-07-10-membound-sol.md: 3.01 of
  3.35 TB/s on an H100);
- attention: FlashAttention-3 on an H100, not causal, 16k tokens (arXiv 2407.08608, figures 5 and 6), scaled to other
  GPUs by their bf16 rate. There are figures for head dims 64 and 128. In between they are interpolated, with 80 and 88
  paying for 96 lanes. Below 64 the rate is proportional to the head dim, because the exponentials then take the
  time, and their number does not depend on it;
- a launch costs the CPU 5 us (28 to 30 thousand operators of the reference's step in 100 to 150 ms).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from vjepa_fast.common.errors import ConfigError

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_H100_FLOPS = 989e12
_ATTENTION = {
    (64, "forward"): (333, 392, 460, 476, 496, 497),
    (64, "backward"): (272, 363, 422, 453, 472, 474),
    (128, "forward"): (467, 565, 625, 638, 646, 648),
    (128, "backward"): (316, 424, 501, 542, 559, 561),
}
"""TFLOP/s on an H100 at _LENGTHS, by head dim; the backward counts 2.5 times the forward's arithmetic."""

NARROW = 512
"""A matrix product is narrow where its input or output has fewer features: the predictor's."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do. Bytes count reads and writes."""

    name: str
    bytes_per_s: float
    """Data sheet."""
    flops_per_s: float
    """Dense bf16 with fp32 sums, data sheet."""
    fp32_flops_per_s: float
    """On the ordinary units, data sheet."""
    memory_bytes: float
    float8_speed: float = 0.0
    """Of float8 products beside bf16 ones, both with fp32 sums, data sheet; 0: there are none."""
    matmul_share: float = 0.8
    """Of flops_per_s, in matrix products."""
    narrow_matmul_share: float = 0.8
    """Share of the matrix rate that narrow products reach, beside the time of their bytes."""
    memory_share: float = 0.9
    """Of bytes_per_s, in memory-bound kernels."""
    launch_s: float = 5e-6
    """What a launch costs the CPU."""
    attention_flops_per_s: Mapping[tuple[int, str], float] = field(default_factory=dict)
    """Measured, by (head dim, forward or backward)."""
    measured: tuple[str, ...] = ()
    """Which rates were measured; the others are assumed."""

    def matmul_rate(self, features: int) -> float:
        """FLOP/s of products whose narrower side has this many features."""
        return self.flops_per_s * (self.narrow_matmul_share if features < NARROW else self.matmul_share)

    def memory_rate(self) -> float:
        """Bytes/s of memory-bound kernels."""
        return self.bytes_per_s * self.memory_share

    def attention_rate(self, head_dim: int, length: float, phase: str) -> float:
        """FLOP/s of attention.

        Args:
            head_dim: of queries, keys and values.
            length: tokens of a sequence, weighted by their work.
            phase: forward or backward.
        """
        known = self.attention_flops_per_s.get((head_dim, phase))
        if known is not None:
            return known
        scale = self.flops_per_s / _H100_FLOPS * 1e12
        narrow, wide = (_at_length(_ATTENTION[dim, phase], length) for dim in (64, 128))
        if head_dim <= 64:
            return scale * narrow * head_dim / 64
        lanes = min(128, 32 * math.ceil(head_dim / 32))
        return scale * (narrow + (wide - narrow) * (lanes - 64) / 64) * min(1.0, head_dim / lanes)


def _at_length(rates: tuple[int, ...], length: float) -> float:
    """Linear in the logarithm of the length; the shortest sequences lose in proportion."""
    if length < _LENGTHS[0]:
        return rates[0] * length / _LENGTHS[0]
    place = min(math.log2(length / _LENGTHS[0]), len(rates) - 1.0)
    left = min(int(place), len(rates) - 2)
    return rates[left] + (rates[left + 1] - rates[left]) * (place - left)


_TABLE = (
    Gpu("b200", 8.0e12, 2250e12, 80e12, 180e9, 2.0),
    Gpu("h200", 4.8e12, 989e12, 67e12, 141e9, 2.0),
    Gpu("h100", 3.35e12, 989e12, 67e12, 80e9, 2.0),
    Gpu("h100-pcie", 2.0e12, 756e12, 51e12, 80e9, 2.0),
    Gpu("a100-80gb", 2.039e12, 312e12, 19.5e12, 80e9),
    Gpu("a100-40gb", 1.555e12, 312e12, 19.5e12, 40e9),
    Gpu("l40s", 0.864e12, 362e12, 91.6e12, 48e9, 2.0),
    Gpu("l4", 0.3e12, 121e12, 30.3e12, 24e9, 2.0),
    Gpu("rtx5090", 1.792e12, 209.5e12, 104.8e12, 32e9, 2.0),
    Gpu("rtx4090", 1.008e12, 165.2e12, 82.6e12, 24e9, 2.0),
    Gpu("rtx4080", 0.717e12, 97.5e12, 48.7e12, 16e9, 2.0),
    Gpu("rtx3090", 0.936e12, 71e12, 35.6e12, 24e9),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ConfigError: unknown name.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key in GPUS:
        return GPUS[key]
    # What the driver calls it, as in "NVIDIA GeForce RTX 4090".
    found = gpu_of_device(name)
    if found is not None:
        return found
    inside = [known for known in GPUS if len(key) > 2 and key in known]
    nearest = inside or get_close_matches(key.replace("-", ""), GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigError(f"--gpu is {name!r}; {hint}known are {', '.join(GPUS)}")


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that torch calls `device_name`, as "NVIDIA H200"; None where the table lacks it."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    # RTX 4090 is two words there, one here.
    words += [first + second for first, second in zip(words, words[1:], strict=False)]
    found = [gpu for gpu in _TABLE if all(word in words for word in gpu.name.split("-"))]
    return max(found, key=lambda gpu: len(gpu.name), default=None)


def with_measured(gpu: Gpu, report: Mapping[str, Any]) -> Gpu:
    """The GPU with rates from a result file.

    Args:
        gpu: what is not in the file keeps its values.
        report: the content of gpu_run.json (its part `floors`), or of any file with `limits` (bytes_per_s,
            flops_per_s) and `rates` (matmul_share, narrow_matmul_share, launch_s, and attention: a list of head_dim,
            phase, flops_per_s).

    Raises:
        ConfigError: no rates in it.
    """
    floors = (report.get("floors") or {}).get("result") or report
    limits, rates = floors.get("limits") or {}, dict(report.get("rates") or {})
    changes: dict[str, Any] = {}
    if limits:
        share = limits["flops_per_s"] / gpu.flops_per_s
        changes = {
            "memory_share": limits["bytes_per_s"] / gpu.bytes_per_s,
            "matmul_share": share,
            "narrow_matmul_share": share,
        }
    attention = rates.pop("attention", [])
    unknown = set(rates) - {"matmul_share", "narrow_matmul_share", "launch_s"}
    if unknown or not (limits or rates or attention):
        raise ConfigError(
            f"the rates file has {', '.join(sorted(unknown)) or 'no rates'}; expected limits, as gpu_run "
            "writes them, or rates (matmul_share, narrow_matmul_share, launch_s, attention)"
        )
    changes |= rates
    if attention:
        changes["attention_flops_per_s"] = {
            (entry["head_dim"], entry["phase"]): entry["flops_per_s"] for entry in attention
        }
    return replace(gpu, **changes, measured=tuple(changes))
