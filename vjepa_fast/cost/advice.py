"""Suggests settings that save memory, and how much, for a run that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vjepa_fast.config.schema import Config
from vjepa_fast.cost.memory import peak_memory
from vjepa_fast.masking.batch import MaskBatch

FITS = 0.92
"""Share of a GPU's memory that a run may be predicted to take: the rest is for the CUDA context and for fragments."""

_GIB = 2**30
_KEEP, _MICRO = "model.activation_checkpointing", "optimization.grad_accumulation"


@dataclass(frozen=True)
class Change:
    """Some settings, and the memory with them."""

    settings: tuple[str, ...]
    """As overrides of the command line."""
    note: str
    """What a user has to know about them, in a subordinate clause; may be empty."""
    peak: float
    """Bytes."""

    def __str__(self) -> str:
        return f"{' '.join(self.settings)}{', ' * bool(self.note)}{self.note}: {self.peak / _GIB:.1f} GiB"


@dataclass(frozen=True)
class Adviser:
    """What settings would change for a run.

    Args:
        cfg: of the run.
        steps: masks of some steps of one process.
        num_processes: of the run.
        kernels: as peak_memory.
    """

    cfg: Config
    steps: Sequence[Sequence[MaskBatch]]
    num_processes: int = 1
    kernels: bool = True

    def single(self) -> list[Change]:
        """Each of the settings alone that saves memory; first what costs the least time."""
        now = self.peak(self.cfg)
        changes = (self._change([step]) for step in self._singles())
        return [change for change in changes if change.peak < now]

    def what_fits(self, limit: float) -> list[Change]:
        """The single settings with which the run takes at most `limit` bytes; if none is enough, the first combination
        that is; else nothing."""
        alone = [self._change([step]) for step in self._singles() if step.key != _MICRO]
        fitting = [change for change in alone if change.peak <= limit]
        fitting += self._first_below(limit, ([step] for step in self._accumulation()))
        return fitting or self._first_below(limit, self._combined())

    def least(self) -> Change:
        """All that can be done."""
        return min(map(self._change, self._combined()), key=lambda change: change.peak)

    def peak(self, cfg: Config) -> float:
        """Bytes of a config with the same clips and masks."""
        return peak_memory(cfg, self.steps, num_processes=self.num_processes, kernels=self.kernels).peak

    def _change(self, steps: Sequence[_Setting]) -> Change:
        cfg = self.cfg.model_copy(deep=True)
        for step in steps:
            step.set(cfg)
        notes = [step.note for step in steps if step.note]
        return Change(tuple(step.text for step in steps), notes[0] if len(steps) == 1 and notes else "", self.peak(cfg))

    def _first_below(self, limit: float, choices: Iterable[Sequence[_Setting]]) -> list[Change]:
        fitting = (change for change in map(self._change, choices) if change.peak <= limit)
        return list(islice(fitting, 1))

    def _singles(self) -> Iterator[_Setting]:
        cfg = self.cfg
        if cfg.model.dtype == "float32":
            yield _Setting("train.dtype", "bfloat16", "for half of the activations")
        if self.num_processes > 1 and cfg.train.parallel == "ddp" and cfg.model.dtype != "float16":
            if not cfg.train.shard_optimizer:
                yield _Setting("train.shard_optimizer", True, "")
            if cfg.model.target_precision == "same" and len(set(cfg.data.dataset_fpcs)) == 1:
                yield _FSDP
        if cfg.model.checkpointing == "none":
            yield _Setting(_KEEP, "selective", "")
        if cfg.model.checkpointing != "full":
            yield _Setting(_KEEP, "full", "")
        yield from islice(self._accumulation(), 1)

    def _accumulation(self) -> Iterator[_Setting]:
        parts = 2 * self.cfg.optimization.grad_accumulation
        while parts <= max(batch.batch_size for batch in self.steps[0]):
            yield _Setting(_MICRO, parts, "which changes no loss")
            parts *= 2

    def _combined(self) -> Iterator[list[_Setting]]:
        """Growing: the cheap settings, then recomputation, then micro-batches."""
        singles = list(self._singles())
        cheap = [setting for setting in singles if setting.key in ("train.dtype", "train.shard_optimizer")]
        ways = [cheap]
        if _FSDP in singles:
            ways.append([*(setting for setting in cheap if setting.key != "train.shard_optimizer"), _FSDP])
        for way in ways:
            yield way
            for kind in ("selective", "full"):
                recomputed = [setting for setting in singles if (setting.key, setting.value) == (_KEEP, kind)]
                if recomputed or self.cfg.model.checkpointing == kind:
                    yield [*way, *recomputed]
                    yield from ([*way, *recomputed, setting] for setting in self._accumulation())


@dataclass(frozen=True)
class _Setting:
    key: str
    value: str | int
    note: str

    @property
    def text(self) -> str:
        return f"{self.key}={str(self.value).lower()}"

    def set(self, cfg: Config) -> None:
        """In the config."""
        if self == _FSDP:
            cfg.train.shard_optimizer = False
        section, _, name = self.key.partition(".")
        setattr(getattr(cfg, section), name, self.value)
        if self.key == "train.dtype":
            cfg.model.dtype = cfg.train.dtype


_FSDP = _Setting("train.parallel", "fsdp", "")
