"""Fixtures for tests of Triton kernels: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vjepa_fast.ops.triton_support import dispatch


class PoisonedTorch:
    """The torch module, but memory that would be uninitialised holds NaN, or the smallest integer."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = torch.empty(*args, **kwargs)
        # A custom operator's fake implementation allocates here too.
        if isinstance(out, torch._subclasses.FakeTensor) or out.device.type == "meta":
            return out
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device on which operators run their Triton kernels, with poisoned outputs and launches counted from 0."""
    pytest.importorskip("triton")
    if dispatch.interpreted():
        from tests.helpers.interpreter import repair

        repair()
        device = torch.device("cpu")
    else:
        if not torch.cuda.is_available():
            pytest.skip("kernels need a CUDA device or TRITON_INTERPRET=1")
        device = torch.device("cuda")
    monkeypatch.setenv("VJEPA_FAST_OPS", "triton")
    op = request.module.__name__.replace("tests.", "vjepa_fast.", 1).replace(".test_", ".")
    if importlib.util.find_spec(op):
        monkeypatch.setattr(importlib.import_module(op), "torch", PoisonedTorch(), raising=False)
    dispatch.launches.clear()
    torch._dynamo.reset()
    yield device


@pytest.fixture
def own_attention_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Attention back ends are chosen as if for the first time, and what is chosen is kept in a folder of the test's."""
    from tests.ops.attention import stand_ins
    from vjepa_fast.ops.attention import choice as _attention_choice

    monkeypatch.delenv(_attention_choice.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stand_ins.forget()
    yield
    stand_ins.forget()


FAR = 2**30 + 32
"""Elements from one row to the next: it fits an int32, and twice as much does not."""


def far_rows(x: torch.Tensor) -> torch.Tensor:
    """Row 0 of an fp32 [3, D] tensor, with the others FAR and 2 FAR elements behind it; little memory is touched."""
    assert x.dtype == torch.float32 and len(x) == 3
    # Python names this flag of Linux from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * (2 * FAR + x.shape[1]), flags=flags)
    for row, values in enumerate(x):
        start = 4 * FAR * row
        memory[start : start + 4 * len(values)] = values.numpy().tobytes()
    return torch.frombuffer(memory, dtype=torch.float32, count=x.shape[1])
