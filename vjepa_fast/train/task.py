"""The interface between the training loop and what it trains.

`vjepa_fast.train.trainer.Trainer` knows signals, logs, checkpoints, bad steps and the order of a step; a Task knows
data, model, loss and what of them is kept and reported. vjepa_fast.train.pretraining is the task of V-JEPA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import BrokenVideo
from vjepa_fast.distributed.processes import Processes
from vjepa_fast.train.monitor.progress import RunConsole


@dataclass(frozen=True)
class RunContext:
    """Where a run takes place."""

    cfg: Config
    """Config of the run; a task may fill in what the config leaves to the data, such as optimization.ipe."""
    folder: Path
    """Run folder."""
    device: torch.device
    """Device of this process."""
    processes: Processes
    console: RunConsole
    """Silent on all processes but the first."""
    profiled: bool
    """Whether a profiler will look at single operators."""

    def say(self, sentence: str, style: str | None = None) -> None:
        """Print a line for people."""
        self.console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)


class Samples(Protocol):
    """A batch, as the loop sees it."""

    step: int
    sample_ids: list[Tensor]
    """Global sample numbers of this process, int64 [B] for each group."""

    @property
    def num_samples(self) -> int:
        """Samples of this process."""
        ...


class Batches(Protocol):
    """Batches of a run in their order; vjepa_fast.data.loader.Loader is one."""

    @property
    def num_tried(self) -> int:
        """Videos opened so far on this process."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...

    def broken(self) -> list[BrokenVideo]: ...

    def close(self) -> None: ...


class StepOutcome(Protocol):
    """What a step did. Tensors stay on the device; reading one waits for it."""

    loss: Tensor
    """Scalar: this process's share of the loss times the number of processes; their mean is the loss of the step."""
    grad_norm: Tensor
    """Scalar: norm of all gradients together, before any clipping."""
    skipped: Tensor
    """Scalar: 1 where the step changed no weights."""

    @property
    def schedule(self) -> dict[str, float]:
        """Columns of the log that the host knows: lr, weight_decay, momentum."""
        ...


class Task(Protocol):
    """What is trained. Made by a function of the RunContext.

    Methods whose description says so are called on all processes at the same point, and may communicate.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def loader(self) -> Batches: ...

    def run_step(self, batch: Any) -> StepOutcome:
        """Train on one batch; all processes.

        Raises:
            UserError: memory ran out; the message says what would fit.
        """
        ...

    # What is reported.

    def announce(self) -> None:
        """Tell people what is trained on what, before the first step."""
        ...

    def about(self) -> dict[str, Any]:
        """What run.json says about the model and the data."""
        ...

    def rewind_health(self, jsonl_path: Path) -> None:
        """Be where the rows of metrics.jsonl end; on the first process."""
        ...

    def metrics(self, outcome: Any) -> dict[str, float]:
        """Values of a step beside the loss, for metrics.jsonl; on the first process."""
        ...

    def watch(self, row: Mapping[str, float | None]) -> None:
        """Look at a row of metrics.jsonl and warn where it is unhealthy; on the first process."""
        ...

    def verdict(self) -> None:
        """Tell people at the end how healthy the run was; on the first process."""
        ...

    # What a checkpoint holds.

    @property
    def in_shards(self) -> bool:
        """Whether each process keeps a part of the parameters."""
        ...

    def collect(self) -> None:
        """Bring together what processes hold in parts and one of them writes; all processes."""
        ...

    def contents(self, step: int, loss: float) -> dict[str, Any]:
        """A checkpoint after `step` steps, in the layout of its files, with an entry `vjepa_fast`: {"step": ...}."""
        ...

    def load(self, path: Path) -> dict[str, Any]:
        """Weights and optimizer out of a checkpoint; its other entries. All processes."""
        ...

    def load_state(self, own: Mapping[str, Any]) -> None:
        """Restore the state of the run from the entry `vjepa_fast` of a checkpoint."""
        ...

    def roll_back_state(self, own: Mapping[str, Any]) -> None:
        """Restore from the entry `vjepa_fast` only what belongs to the weights; the data continues where it is."""
        ...

    def skip_to(self, step: int) -> None:
        """Advance the state of a run whose checkpoint has no entry `vjepa_fast` by a number of steps."""
        ...

    def take_weights(self, path: Path) -> str:
        """Begin with the weights of a pretrained model; what was taken, in a sentence. All processes."""
        ...

    def changes(self, own: Mapping[str, Any]) -> Sequence[str]:
        """What beside the config is not as it was when the checkpoint was written, as `name old -> new`."""
        ...
