"""Predicts the communication of a step on many GPUs: bytes exchanged, and the share that is not hidden.

Bytes that one GPU sends, of n, for P trained parameters of which the encoder's are E (the target encoder has as many):

- DDP all-reduces gradients of g bytes: 2 (n - 1) / n * g P.
- ZeRO-1 (vjepa_fast.optim.zero) reduce-scatters gradients, (n - 1) / n * g P, and gathers weights of w bytes,
  (n - 1) / n * w (P + E); w is 2 within blocks in half precision, else 4.
- FSDP2 gathers fp32 weights for the forward, for the backward again, and the target encoder's, and reduce-scatters
  gradients: (n - 1) / n * (4 (2 P + E) + 4 P).

Time of a collective over S bytes on a ring of n GPUs, of which each sends B bytes/s and starts a message in a seconds:
(n - 1) / n * S / B + (n - 1) a for reduce-scatter and all-gather, twice that for all-reduce (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009; the same factors in
NVIDIA/nccl-tests, doc/PERFORMANCE.md). On m machines of k GPUs, hierarchically: a ring within the machine over all
bytes, and k rings between machines, each over S / k, which share the machine's network of N bytes/s and start a message
in b seconds: (k - 1) / k * S / B + (k - 1) a + (m - 1) / m * S / N + (m - 1) b (Jia et al., arXiv 1807.11205,
hierarchical all-reduce; Mikami et al., arXiv 1811.05233, 2D torus). The faster of the two is taken.

What overlaps: gradients of a block leave when its backward is done, while the next one's runs; with ZeRO-1 weights
arrive in the order in which the next step reads them, while it runs; FSDP2 gathers one block ahead. Collectives run one
after another. That they take memory bandwidth and multiprocessors from the computation, and that GPUs wait for the
slowest, is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.common.profiler_labels import backward_of
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.loads import networks_of
from vjepa_fast.cost.parameters import count_parameters
from vjepa_fast.cost.prediction import Prediction

Way = Literal["ddp", "zero", "fsdp"]
WAYS: tuple[Way, ...] = ("ddp", "zero", "fsdp")
NAMES: dict[Way, str] = {"ddp": "DDP", "zero": "ZeRO-1", "fsdp": "FSDP2"}

SHARE = 0.8
"""Of a link's data sheet that collectives are assumed to reach; not measured here."""

INSIDE = {"b200": 900e9, "h200": 450e9, "h100": 450e9, "a100-80gb": 300e9, "a100-40gb": 300e9, "h100-pcie": 64e9}
"""Bytes/s that a GPU sends to others of its machine, one way, data sheets: NVLink 5, 4 and 3, PCIe 5."""

PCIE = 32e9
"""The same for all other GPUs: PCIe 4, 16 lanes."""

INSIDE_LATENCY, OUTSIDE_LATENCY = 2e-6, 5e-6
"""Seconds to start a message within a machine and between machines; assumed."""

LINKS = {"nvlink": None, "ib400": (0, 400e9), "eth100": (1, 100e9), "eth25": (1, 25e9)}
"""Adapters a machine (0: one for each GPU) and bits/s of each; None: all GPUs are in one NVLink domain."""


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs."""

    nodes: int
    gpus_per_node: int
    link: str
    """A name of LINKS, or `8x400`: adapters a machine, and Gb/s of each."""
    inside: float
    """Bytes/s of a GPU within its machine, data sheet."""
    outside: float | None
    """Bytes/s of a machine to others, data sheet; None: as within."""

    @classmethod
    def of(cls, gpu: str, nodes: int, gpus_per_node: int, link: str) -> Cluster:
        """Raises:
        ConfigError: no such link.
        """
        return cls(nodes, gpus_per_node, link, INSIDE.get(gpu, PCIE), _outside(link, gpus_per_node))

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def pass_of(self, num_bytes: float) -> float:
        """Seconds of a reduce-scatter or an all-gather of so many bytes."""
        return min(self.ring(num_bytes), self.hierarchical(num_bytes))

    def ring(self, num_bytes: float) -> float:
        """One ring over all GPUs, through every adapter; see the module."""
        n, inside = self.num_gpus, SHARE * self.inside
        if self.nodes == 1 or self.outside is None:
            return _ring(n, num_bytes, inside, INSIDE_LATENCY)
        return _ring(n, num_bytes, min(inside, SHARE * self.outside), OUTSIDE_LATENCY)

    def hierarchical(self, num_bytes: float) -> float:
        """Rings within machines, and rings between them; see the module."""
        if self.outside is None:
            return self.ring(num_bytes)
        return _ring(self.gpus_per_node, num_bytes, SHARE * self.inside, INSIDE_LATENCY) + _ring(
            self.nodes, num_bytes, SHARE * self.outside, OUTSIDE_LATENCY
        )


def _ring(n: int, num_bytes: float, rate: float, latency: float) -> float:
    return (n - 1) / n * num_bytes / rate + (n - 1) * latency


def _outside(link: str, gpus_per_node: int) -> float | None:
    if link in LINKS:
        found = LINKS[link]
        return None if found is None else (found[0] or gpus_per_node) * found[1] / 8
    adapters, _, speed = link.partition("x")
    if not (adapters.isdecimal() and speed.isdecimal() and int(adapters) and int(speed)):
        raise ConfigError(
            f"--link is {link!r}; known are {', '.join(LINKS)}, or adapters a machine and Gb/s of each, as in 8x400"
        )
    return int(adapters) * int(speed) * 1e9 / 8


@dataclass(frozen=True)
class _Unit:
    """A block, or what lies outside of them, of which there is one for each network."""

    parameters: float
    weight_bytes: float
    """Of what ZeRO-1 gathers."""
    forward: float = 0.0
    backward: float = 0.0
    """Seconds of its part of a micro-batch."""


@dataclass(frozen=True)
class _Work:
    """A step, cut up; blocks in the order of the forward."""

    predictor: list[_Unit]
    encoder: list[_Unit]
    targets: list[_Unit]
    outside: list[_Unit]
    """Of predictor, encoder and target encoder."""
    update: float
    """Seconds of the optimizer."""
    total: float
    """Seconds of the step."""


def _cut(cfg: Config, prediction: Prediction) -> _Work:
    seconds = {part.part: part.total for part in prediction.parts}
    networks, found = networks_of(cfg), count_parameters(cfg.model)
    half = 4 if cfg.model.dtype == "float32" else 2

    def units(parameters: float, depth: int, part: str) -> list[_Unit]:
        times = (
            seconds.get(name, 0.0) / depth / cfg.optimization.grad_accumulation for name in (part, backward_of(part))
        )
        return [_Unit(parameters / depth, half * parameters / depth, *times)] * depth

    encoder, predictor = networks
    predictor_linear = found.linear - found.target_linear
    left = (found.predictor - predictor_linear, found.encoder - found.target_linear, found.target - found.target_linear)
    return _Work(
        units(predictor_linear, predictor.depth, "predictor"),
        units(found.target_linear, encoder.depth, "context encoder"),
        units(found.target_linear, encoder.depth, "target encoder"),
        [_Unit(count, 4 * count) for count in left],
        seconds.get("optimizer", 0.0),
        prediction.busy,
    )


@dataclass(frozen=True)
class Exchange:
    """A step on a cluster. Seconds."""

    way: Way
    num_gpus: int
    sent: float
    """Bytes that a GPU sends in a step."""
    alone: float
    """Seconds of a step on one GPU."""
    busy: float
    """Seconds of all collectives, if nothing ran beside them."""
    exposed_backward: float
    """That the step waits for gradients, and with FSDP2 for weights, in the backward and after it."""
    exposed_forward: float
    """That it waits for weights in the forward."""
    saved: float
    """Seconds saved on the update, which is shared."""

    @property
    def step(self) -> float:
        return self.alone - self.saved + self.exposed_backward + self.exposed_forward

    @property
    def efficiency(self) -> float:
        """Clips/s of a GPU among many over clips/s of one alone; above 1 where a shared update saves more than is
        exposed."""
        return self.alone / self.step


def exchange(way: Way, cfg: Config, prediction: Prediction, cluster: Cluster) -> Exchange:
    """The step of a run on a cluster.

    Args:
        way: of the three.
        cfg: of the run; train.grad_dtype and train.dtype count.
        prediction: of the step on one GPU, with the batch of one GPU.
        cluster: where.
    """
    work, n = _cut(cfg, prediction), cluster.num_gpus
    backward = [*work.predictor[::-1], *work.encoder[::-1]]
    forward = [*work.targets, *work.encoder, *work.predictor]
    grad_bytes = 2 if cfg.train.grad_dtype == "bfloat16" else 4
    gradients = [grad_bytes * unit.parameters for unit in (*backward, *work.outside[:2])]
    backward_times, forward_times = [unit.backward for unit in backward], [unit.forward for unit in forward]
    kept = (n - 1) / n
    saved = 0.0 if way == "ddp" else kept * work.update
    sending = [cluster.pass_of(size) for size in gradients]
    if way == "fsdp":
        # What lies outside of blocks is gathered before all else.
        outside = 4 * sum(unit.parameters for unit in work.outside)
        weights, again = ([4 * unit.parameters for unit in units] for units in (forward, backward))
        first, arriving = cluster.pass_of(outside), [cluster.pass_of(size) for size in weights]
        coming, leaving, last = [cluster.pass_of(size) for size in again], sending[: len(backward)], sum(sending[-2:])
        # All of that for every micro-batch.
        times = cfg.optimization.grad_accumulation
        return Exchange(
            way,
            n,
            times * kept * (outside + sum(weights) + sum(again) + sum(gradients)),
            work.total,
            times * (first + sum(arriving) + sum(coming) + sum(sending)),
            times * (_ahead(backward_times, coming, leaving) + last),
            times * (first + _ahead(forward_times, arriving, [0.0] * len(forward))),
            saved,
        )
    if way == "ddp":
        exposed = _behind(backward_times, [2 * message for message in sending])
        return Exchange(way, n, 2 * kept * sum(gradients), work.total, 2 * sum(sending), exposed, 0.0, saved)
    outside = sum(unit.weight_bytes for unit in work.outside)
    first, arriving = cluster.pass_of(outside), [cluster.pass_of(unit.weight_bytes) for unit in forward]
    return Exchange(
        way,
        n,
        kept * (sum(gradients) + outside + sum(unit.weight_bytes for unit in forward)),
        work.total,
        sum(sending) + first + sum(arriving),
        _behind(backward_times, sending),
        _in_order(forward_times, arriving, first),
        saved,
    )


def _behind(work: Sequence[float], messages: Sequence[float]) -> float:
    """How long messages last beyond the work: each is ready when its piece of work is done, the last ones at the
    end."""
    ready = done = 0.0
    for place, message in enumerate(messages):
        ready += work[place] if place < len(work) else 0.0
        done = max(ready, done) + message
    return max(0.0, done - sum(work))


def _in_order(work: Sequence[float], messages: Sequence[float], first: float) -> float:
    """How long work waits for messages that are sent one after another from the beginning, after a `first`."""
    now = arrived = first
    for seconds, message in zip(work, messages, strict=True):
        arrived += message
        now = max(now, arrived) + seconds
    return now - sum(work)


def _ahead(work: Sequence[float], arriving: Sequence[float], leaving: Sequence[float]) -> float:
    """How long work waits where, beside a piece of it, what the next one needs arrives and what the last one gave
    leaves."""
    beside = zip([*arriving[1:], 0.0], [0.0, *leaving[:-1]], work, strict=True)
    return arriving[0] + sum(max(0.0, one + other - seconds) for one, other, seconds in beside) + leaving[-1]


def as_table(cfg: Config, prediction: Prediction, cluster: Cluster) -> str:
    """All three ways on a cluster, as text."""
    rows: list[tuple[str, ...]] = [
        ("", "sent, GB", "busy, ms", "exposed in backward", "in forward", "update saved", "step, ms", "efficiency")
    ]
    for way in WAYS:
        x = exchange(way, cfg, prediction, cluster)
        rows.append(
            (
                NAMES[way],
                f"{x.sent / 1e9:.2f}",
                *(f"{1e3 * t:.1f}" for t in (x.busy, x.exposed_backward, x.exposed_forward, x.saved, x.step)),
                f"{100 * x.efficiency:.1f} %",
            )
        )
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    between = ""
    if cluster.nodes > 1 and cluster.outside is not None:
        between = f", {cluster.outside * 8 / 1e9:g} Gb/s a machine between them ({cluster.link})"
    title = (
        f"On {cluster.num_gpus} GPUs ({cluster.nodes} x {cluster.gpus_per_node}; {cluster.inside / 1e9:g} GB/s "
        f"a GPU within a machine{between}), each with its own batch, predicted:"
    )
    lines = [
        "".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    note = (
        f"Assumed, not measured: {100 * SHARE:.0f} % of the links' data sheets, {1e6 * INSIDE_LATENCY:g} and "
        f"{1e6 * OUTSIDE_LATENCY:g} us a message (vjepa_fast/cost/communication.py)."
    )
    return "\n".join([title, "", *lines, "", note])
