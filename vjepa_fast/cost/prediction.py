"""Predicts the time of a training step on a named GPU, part by part.

A matrix product or attention takes the longer of arithmetic and bytes, everything else its bytes. A part takes the
longer of what its kernels take and what launching them takes the CPU; the parts add up. The loader runs beside the
step, which waits where the loader is slower. Communication between GPUs is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.common.profiler_labels import PARTS, backward_of
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.counter import MakeStep, count_step
from vjepa_fast.cost.gpus import Gpu
from vjepa_fast.cost.loads import Loads, image_groups
from vjepa_fast.cost.operations import Operation, step_operations
from vjepa_fast.masking.batch import MaskBatch

ORDER = tuple(name for part in PARTS for name in (part, backward_of(part)))


@dataclass(frozen=True)
class PartCost:
    """Seconds of one part of a step, by what they go to."""

    part: str
    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    """Seconds that the CPU needs to launch the part."""
    launches: int = 0

    @property
    def kernels(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        return max(self.kernels, self.launch)


@dataclass(frozen=True)
class Prediction:
    """A step on a GPU."""

    gpu: Gpu
    clips: float
    parts: tuple[PartCost, ...]
    flops: float
    """Model FLOPs of a step; recomputed work is not counted."""
    loader_clips_per_s: float | None = None

    @property
    def busy(self) -> float:
        """Seconds that the step itself takes."""
        return sum(part.total for part in self.parts)

    @property
    def loader(self) -> float | None:
        """Seconds that the loader takes for a batch."""
        return None if self.loader_clips_per_s is None else self.clips / self.loader_clips_per_s

    @property
    def total(self) -> float:
        return max(self.busy, self.loader or 0.0)

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.total

    def milliseconds(self) -> dict[str, float]:
        """By part."""
        return {part.part: part.total * 1e3 for part in self.parts}

    def as_table(self) -> str:
        """Milliseconds by part and kind."""
        rows: list[tuple[str, ...]] = [("part", "matmul", "attention", "memory", "launches", "launching", "total")]
        for part in self.parts:
            rows.append(
                (
                    part.part,
                    *(f"{1e3 * x:.2f}" for x in (part.matmul, part.attention, part.memory)),
                    str(part.launches),
                    f"{1e3 * part.launch:.2f}",
                    f"{1e3 * part.total:.2f}",
                )
            )
        sums = [1e3 * sum(getattr(part, kind) for part in self.parts) for kind in ("matmul", "attention", "memory")]
        rows.append(
            (
                "step",
                *(f"{x:.2f}" for x in sums),
                str(sum(part.launches for part in self.parts)),
                f"{1e3 * sum(part.launch for part in self.parts):.2f}",
                f"{1e3 * self.busy:.2f}",
            )
        )
        if self.loader is not None:
            rows.append(("loader, beside it", "", "", "", "", "", f"{1e3 * self.loader:.2f}"))
        width = max(len(row[0]) for row in rows)
        return "\n".join(row[0].ljust(width) + "".join(cell.rjust(11) for cell in row[1:]) for row in rows)


def seconds_of(operation: Operation, gpu: Gpu) -> float:
    """What the kernels of an operation take."""
    by_bytes = operation.num_bytes / gpu.memory_rate()
    if operation.kind == "matmul":
        faster = gpu.float8_speed if operation.float8 else 1.0
        return max(by_bytes, operation.flops / (faster * gpu.matmul_rate(operation.features)))
    if operation.kind == "attention":
        backward = operation.part.endswith("backward") and not operation.name.endswith("again")
        rate = gpu.attention_rate(operation.features, operation.length, "backward" if backward else "forward")
        return max(by_bytes, operation.flops / rate if rate else 0.0)
    return by_bytes


def add_up(operations: Iterable[Operation], gpu: Gpu) -> tuple[PartCost, ...]:
    """Parts in the order of a step; those without an operation are left out."""
    times: dict[str, dict[str, float]] = {}
    launches: dict[str, int] = {}
    for op in operations:
        kinds = times.setdefault(op.part, {"matmul": 0.0, "attention": 0.0, "memory": 0.0})
        kinds[op.kind] += seconds_of(op, gpu)
        launches[op.part] = launches.get(op.part, 0) + op.launches
    return tuple(
        PartCost(part, **times[part], launch=launches[part] * gpu.launch_s, launches=launches[part])
        for part in ORDER
        if part in times
    )


def predict(
    cfg: Config,
    gpu: Gpu,
    steps: Sequence[Sequence[MaskBatch]],
    *,
    plain_step: MakeStep | None = None,
    loader_clips_per_s: float | None = None,
) -> Prediction:
    """Time of a step.

    Args:
        cfg: of the run.
        gpu: where; see vjepa_fast.cost.gpus.
        steps: masks of some steps, each a list of one MaskBatch a frames-per-clip group; the prediction is for their
            mean.
        plain_step: None: a step with our kernels. vjepa_fast.train.step.TrainStep: on plain PyTorch, whose elementwise
            operators are counted on the first of the steps as that makes it.
        loader_clips_per_s: given rate of the loader; None: it keeps up.

    Raises:
        ConfigError: float8 products on a GPU that has none.
    """
    if cfg.model.target_precision == "float8" and not gpu.float8_speed:
        raise ConfigError(
            f"model.target_precision is float8, which {gpu.name} has no matrix units for; `same` works everywhere"
        )
    loads = Loads.of(steps, image_groups(cfg))
    operations = step_operations(cfg, loads)
    if plain_step is not None:
        operations = plain_operations(cfg, operations, steps[0], plain_step)
    # A multiply-add as two; the attention of a backward counts twice the forward, as in vjepa_fast.cost.flops.
    flops = sum(
        op.flops * (0.8 if op.kind == "attention" and op.part.endswith("backward") else 1.0)
        for op in operations
        if not op.name.endswith("again")
    )
    units = replace(gpu, flops_per_s=gpu.fp32_flops_per_s) if cfg.model.dtype == "float32" else gpu
    return Prediction(gpu, loads.clips, add_up(operations, units), flops, loader_clips_per_s)


def plain_operations(
    cfg: Config, operations: Iterable[Operation], masks: Sequence[MaskBatch], make_step: MakeStep
) -> list[Operation]:
    """The operations on plain PyTorch: the same products and attention, all else as it is dispatched."""
    heavy = [op for op in operations if op.kind != "memory"]
    num_heavy: dict[str, int] = {}
    for op in heavy:
        num_heavy[op.part] = num_heavy.get(op.part, 0) + op.launches
    rest = []
    for part, tally in count_step(cfg, masks, kernels=False, make_step=make_step).items():
        if part in ORDER:
            rest.append(
                Operation(
                    part,
                    "memory",
                    "elementwise",
                    tally.elementwise_bytes,
                    launches=max(0, tally.launches - num_heavy.get(part, 0)),
                )
            )
    return heavy + rest
