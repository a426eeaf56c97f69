"""Counts kernel launches and bytes of a step, operator by operator, as torch dispatches them.

Every operator that computes or copies is one launch; views and allocations are none. Bytes are those of its inputs and
outputs, each once. So an operator that torch runs as several kernels (a reduction in two stages) counts as one, and one
that reads part of an input counts all of it; both err in favour of what uses many operators.

`count_step` runs steps on fake tensors: shapes and types without memory or arithmetic, at any size on any machine.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vjepa_fast.common.profiler_labels import Tracker, kind_of
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.loads import image_groups
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models import predictor
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops import linear
from vjepa_fast.ops.triton_support import dispatch

_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "alias",
    "lift_fresh",
    "_reshape_alias",
    "view",
    "is_pinned",
    "_pin_memory",
    "promote_types",
}


@dataclass
class Tally:
    """What some operators did."""

    launches: int = 0
    num_bytes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    """Launches by operator."""
    elementwise_bytes: int = 0
    """The part of num_bytes that is neither of matrix products nor of attention."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.launches + other.launches,
            self.num_bytes + other.num_bytes,
            self.operators + other.operators,
            self.elementwise_bytes + other.elementwise_bytes,
        )


def _returns_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class LaunchCounter(TorchDispatchMode):
    """Counts what is dispatched within it, part by part (vjepa_fast.common.profiler_labels).

    `tallies` maps the parts that were seen to their Tally.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[str, Tally] = {}
        self._tracker = Tracker()

    def __enter__(self) -> LaunchCounter:
        self._tracker.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._tracker.__exit__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace not in ("aten", "vjepa_fast") or name in _NO_LAUNCH or _returns_view(func):
            return out
        tally = self.tallies.setdefault(self._tracker.part, Tally())
        launches = dispatch.kernels_of.get(name, 1) if namespace == "vjepa_fast" else 1
        tally.launches += launches
        tally.operators[name] += launches
        read = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        written = {id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        # What is changed in place is read and written, whether or not it is returned.
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {id(x): x for x in tree_leaves(value) if isinstance(x, Tensor)}
        num_bytes = sum(x.numel() * x.element_size() for x in (*read.values(), *written.values()))
        tally.num_bytes += num_bytes
        if kind_of(name) == "other":
            tally.elementwise_bytes += num_bytes
        return out

    @property
    def total(self) -> Tally:
        return sum(self.tallies.values(), Tally())


@contextlib.contextmanager
def fake_tensors(kernels: bool = False) -> Iterator[None]:
    """What is built and run in here has shapes only.

    Args:
        kernels: our operators take the kernels' path, as on a GPU; else plain PyTorch's.
    """
    build = predictor._Interleave.__init__

    def on_the_host(self: Any, masks: Any, device: torch.device) -> None:
        # Lengths are known on the host in training; here they must not become shapes without values.
        with _disable_current_modes():
            build(self, masks, device)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"VJEPA_FAST_OPS": "ref"}))
        if kernels:
            stack.enter_context(mock.patch.object(dispatch, "_choose", lambda _: True))
        stack.enter_context(mock.patch.object(predictor._Interleave, "__init__", on_the_host))
        # Fake tensors have no addresses.
        stack.enter_context(mock.patch.object(linear, "_state", lambda _: (0, 0, 0)))
        # torch would take fake tensors for a type that its multi-tensor norm does not know.
        stack.enter_context(mock.patch.object(clip_grad, "_has_foreach_support", lambda *_: True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def count(run: Callable[[], object]) -> dict[str, Tally]:
    """Tallies of a call, by part."""
    with LaunchCounter() as counter:
        run()
    return counter.tallies


def fake_parameters(module: nn.Module) -> nn.Module:
    """A module that was built on the meta device, with fake parameters; call it within `fake_tensors`."""
    return module.to_empty(device="cpu")


MakeStep = Callable[[VJEPA, Config], Callable[[int, Sequence[Tensor], Sequence[MaskBatch]], object]]
"""Makes the training step of a model: vjepa_fast.train.step.TrainStep, which this package lies below."""


def count_step(cfg: Config, masks: Sequence[MaskBatch], kernels: bool, make_step: MakeStep) -> dict[str, Tally]:
    """A training step of a config, by part, without arithmetic or memory.

    Args:
        cfg: of the run; sizes, dtype, optimizer.
        masks: one MaskBatch for each frames-per-clip group, on the CPU.
        kernels: as fake_tensors.
        make_step: gives what is counted.
    """
    for batch in masks:
        # Worked out once and kept; made here from the true ids.
        _ = batch.context_rows, batch.target_rows, batch.cu_seqlens
    assert cfg.model.tubelet_size is not None and cfg.model.crop_size is not None
    with torch.device("meta"):
        model = VJEPA.from_config(cfg)
    with fake_tensors(kernels):
        fake_parameters(model)
        step = make_step(model, cfg)
        images = [*image_groups(cfg), *[False] * len(masks)]
        clips = [
            torch.empty(
                (b.batch_size, b.grid[0] * (1 if image else cfg.model.tubelet_size), *cfg.model.crop_size, 3),
                dtype=torch.uint8,
            )
            for b, image in zip(masks, images, strict=False)
        ]
        # From the second step on there are moments, and shadows that the optimizer wrote.
        step(0, clips, masks)
        return count(lambda: step(1, clips, masks))
