"""Labels for the parts of a training step; free unless a profiler or counter is active.

A part's forward is a range. Its backward has no place in the code: a mark says that from here on the backward is that
part's, set when the gradient of what the part returned is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.profiler import record_function

PARTS = ("patch embedding", "target encoder", "context encoder", "predictor", "loss", "optimizer")
"""What the time of a step is divided into."""

BACKWARD = "backward"
"""The range of the whole backward; it begins with that of the loss."""

_listener: Callable[[str, str], None] | None = None


def backward_of(part: str) -> str:
    """Name of a part's backward."""
    return f"{part}, {BACKWARD}"


def kind_of(operator: str) -> str:
    """`matmul` (with convolutions and the patch embedding), `attention` or `other`, by the operator's name."""
    name = operator.rpartition("::")[2]
    if "scaled_dot_product" in name or "_attention_" in name or name.startswith("attention"):
        return "attention"
    if name in ("mm", "addmm", "bmm", "baddbmm") or "conv" in name or name.startswith("patch_embed"):
        return "matmul"
    return "other"


def _recording() -> bool:
    return _listener is not None or bool(torch.autograd.profiler._is_profiler_enabled)


def label(part: str) -> AbstractContextManager[object]:
    """A range of the step, such as `with label("loss"):`."""
    return _range(part) if _recording() else contextlib.nullcontext()


@contextlib.contextmanager
def _range(part: str) -> Iterator[None]:
    if _listener is not None:
        _listener("begin", part)
    try:
        with record_function(part):
            yield
    finally:
        if _listener is not None:
            _listener("end", part)


def label_backward(output: Tensor, part: str) -> Tensor:
    """The output of a part, as it is; from when its gradient is known, the backward is that part's."""
    if _recording() and output.requires_grad:
        output.register_hook(lambda _: _mark(backward_of(part)))
    return output


def _mark(name: str) -> None:
    if _listener is not None:
        _listener("mark", name)
    with record_function(name):
        pass


class Tracker:
    """Follows the labels of a step.

    Within `with Tracker() as tracker:`, `tracker.part` is the part at work, "other" outside all of them.
    """

    def __init__(self) -> None:
        self._stack = ["other"]

    @property
    def part(self) -> str:
        return self._stack[-1]

    def _hear(self, what: str, name: str) -> None:
        if what == "begin":
            self._stack.append(backward_of("loss") if name == BACKWARD else name)
        elif what == "end":
            self._stack.pop()
        else:
            self._stack[-1] = name

    def __enter__(self) -> Tracker:
        global _listener
        assert _listener is None, "one tracker at a time"
        _listener = self._hear
        return self

    def __exit__(self, *_: object) -> None:
        global _listener
        _listener = None
