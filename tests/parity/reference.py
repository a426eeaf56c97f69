"""What runs of the references have in common, whatever the release: the checkout, three networks, a training step.

A checkout is named by an environment variable; it is imported at run time and nothing of it is copied.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from vjepa_fast.bench.reference import import_environment

from .cases import OPTIMIZATION, Batch, Case

# The reference enters torch.backends.cuda.sdp_kernel at every attention.
ignore_sdp_warning = pytest.mark.filterwarnings("ignore:.*sdp_kernel:FutureWarning")


@dataclass(frozen=True)
class Checkout:
    """A reference's code.

    Attributes:
        variable: of the environment, naming the folder.
        repository: owner and name.
        commit: that the golden files name; None: they name none.
        part: a folder that it must have, where not every commit has it.
    """

    variable: str
    repository: str
    commit: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        return f"a checkout of {self.repository}" + (f" with {self.part}" if self.part else "")

    @property
    def is_there(self) -> bool:
        """Whether the variable is set."""
        return bool(os.environ.get(self.variable))

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(os.environ[self.variable]).resolve()

    @property
    def needed(self) -> pytest.MarkDecorator:
        """The mark of a test that needs it."""
        return pytest.mark.skipif(not self.is_there, reason=f"{self.variable} does not name {self}")

    def environment(self) -> contextlib.AbstractContextManager[None]:
        """In which its modules can be imported."""
        return import_environment(self.root)

    def load(self, names: Mapping[str, str], stand_ins: Mapping[str, types.ModuleType]) -> types.SimpleNamespace:
        """Modules by short names; `stand_ins` are packages that they import and these runs do not need."""
        with self.environment(), mock.patch.dict(sys.modules, stand_ins):
            return types.SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})


@dataclass
class Triple:
    """Encoder, predictor and target encoder behind the reference's wrappers for several sequences or masks."""

    encoder: nn.Module
    predictor: nn.Module
    target_encoder: nn.Module

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        yield "encoder", self.encoder
        yield "predictor", self.predictor
        yield "target_encoder", self.target_encoder

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the state: `encoder.<key>`, `predictor.<key>`, `target_encoder.<key>`."""
        return {
            f"{part}.{key}": value.clone()
            for part, module in self.parts()
            for key, value in module.backbone.state_dict().items()  # type: ignore[union-attr]
        }

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Load a state as returned by `weights`; position tables may be missing."""
        for part, module in self.parts():
            own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
            missing, unexpected = module.backbone.load_state_dict(own, strict=False)  # type: ignore[union-attr]
            assert not unexpected and all(key.endswith("pos_embed") for key in missing), (missing, unexpected)


@dataclass
class Step:
    """What one step did: gradients are None for parameters that it did not reach.

    `margin` is the smallest |prediction - target|: the L1 loss has a kink there, and a run that rounds differently
    takes another gradient when it is not far above the rounding error.
    """

    loss: float
    gradients: dict[str, torch.Tensor | None]
    lr: float
    weight_decay: float
    momentum: float
    margin: float


@dataclass
class Run:
    steps: list[Step] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Training:
    """The step of a reference's training script, over its own modules, optimizer and schedules.

    A release says what its loss is, and what else its step does differently.

    Args:
        triple: the networks.
        case: their sizes.
        init_opt: the reference's function of this name.
        options: of the optimization.
    """

    def __init__(
        self, triple: Triple, case: Case, init_opt: Callable[..., Any], options: dict[str, Any] = OPTIMIZATION
    ) -> None:
        self.triple, self.case, self.count = triple, case, 0
        self.optimizer, _, self.lr_schedule, self.wd_schedule = init_opt(
            encoder=triple.encoder,
            predictor=triple.predictor,
            iterations_per_epoch=options["ipe"],
            start_lr=options["start_lr"],
            ref_lr=options["lr"],
            warmup=options["warmup"],
            num_epochs=options["epochs"],
            wd=options["weight_decay"],
            final_wd=options["final_weight_decay"],
            final_lr=options["final_lr"],
            mixed_precision=False,
            ipe_scale=options["ipe_scale"],
        )
        first, last = options["ema"]
        count = options["ipe"] * options["epochs"] * options["ipe_scale"]
        self.momenta = (first + i * (last - first) / count for i in range(int(count) + 1))

    def skip(self, num_steps: int) -> None:
        """Move the schedules as a resumed run does."""
        for _ in range(num_steps):
            self.lr_schedule.step()
            self.wd_schedule.step()
            next(self.momenta)
            self.count += 1

    def loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """The loss of one batch and its margin."""
        raise NotImplementedError

    def clip(self) -> None:
        """Clip the gradients, where the script does."""

    def move_target(self, momentum: float) -> None:
        """The moving average."""
        with torch.no_grad():
            old: list[torch.Tensor] = list(self.triple.target_encoder.parameters())
            new: list[torch.Tensor] = list(self.triple.encoder.parameters())
            torch._foreach_mul_(old, momentum)
            torch._foreach_add_(old, new, alpha=1 - momentum)

    def step(self, batch: Batch) -> Step:
        lr, weight_decay = self.lr_schedule.step(), self.wd_schedule.step()
        loss, margin = self.loss(batch)
        loss.backward()
        gradients = {
            f"{part}.{key}": None if value.grad is None else value.grad.clone()
            for part, module in list(self.triple.parts())[:2]
            for key, value in module.backbone.named_parameters()  # type: ignore[union-attr]
            if value.requires_grad
        }
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = next(self.momenta)
        self.move_target(momentum)
        self.count += 1
        return Step(loss.item(), gradients, lr, weight_decay, momentum, margin)
