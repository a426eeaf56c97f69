"""`swap` on modules that are compiled, data parallel or under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vjepa_fast as vf
from tests.swapping.cases import Three, assert_same, run, v2
from vjepa_fast.models import layers

from .stand_ins import DEPTH, PRED_DEPTH, make_clips

pytestmark = pytest.mark.usefixtures("same_start")


@pytest.mark.parametrize("whole", [False, True], ids=["in place", "torch.compile"])
@pytest.mark.parametrize("first", [False, True], ids=["swapped, then compiled", "compiled, then swapped"])
def test_compiled(first: bool, whole: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether the parts of our blocks would be compiled is asked, but compiling takes too long.
    asked = []
    monkeypatch.setattr(layers, "_may_compile", lambda *args: asked.append(args) or False)

    def compiled(module: nn.Module) -> Any:
        if whole:
            return torch.compile(module, backend="eager")
        module.compile(backend="eager")
        return module

    given = v2()
    expected = run(given)
    if first:
        modules = vf.swap(*(compiled(module) for module in given))
        assert all((type(module).__name__ == "OptimizedModule") == whole for module in modules)
    else:
        modules = tuple(compiled(module) for module in vf.swap(*given))
    found = run(modules)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)
    assert calls == [2 * DEPTH + PRED_DEPTH]
    assert len(asked) == (0 if whole else 2 * DEPTH + PRED_DEPTH)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("first", [False, True], ids=["swapped, then DDP", "DDP, then swapped"])
def test_data_parallel(first: bool, calls: list[int]) -> None:
    parallel = nn.parallel.DistributedDataParallel
    given = v2()
    expected = run(given)

    def wrap(modules: Three) -> Three:
        encoder, predictor, target = modules
        target.requires_grad_(True)
        wrapped = (
            parallel(encoder, static_graph=True),
            parallel(predictor, find_unused_parameters=True),
            parallel(target),
        )
        target.requires_grad_(False)
        return wrapped

    if first:
        wrapped = wrap(given)
        modules = vf.swap(*wrapped)
        assert all(one is other for one, other in zip(modules, wrapped, strict=True))
        assert all(module.module is not inner for module, inner in zip(modules, given, strict=True))
    else:
        modules = wrap(vf.swap(*given))
    for _ in range(2):
        found = {name.removeprefix("module."): value for name, value in run(modules).items()}
    assert_same(found, expected)
    assert calls == [2 * (2 * DEPTH + PRED_DEPTH)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """In the dtypes that theirs returns.

    Our predictor's residual stream is in half precision, theirs is fp32; all errors together are a fifth larger.
    """
    modules = v2()
    exact = run(modules)
    with torch.autocast("cpu", dtype=dtype):
        theirs, ours = run(modules), run(vf.swap(*modules))
    assert theirs.keys() == ours.keys()
    errors = torch.zeros(2, dtype=torch.float64)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        pair = [((found[name].double() - value.double()).norm() / value.double().norm()) for found in (ours, theirs)]
        errors += torch.stack(pair).detach()
    assert errors[0] <= 1.4 * errors[1]


def test_autocast_on_a_gpu() -> None:
    """There norms return fp32 under autocast, and the branches of a residual stream its dtype."""
    fast = vf.swap(v2()[0])[0].backbone
    network, clips = vars(fast)["_vf_view"].network, make_clips(1)
    exact = fast(clips)
    was_on, was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with network.casting(torch.device("cuda")):
            features = network(clips)
    finally:
        torch.set_autocast_enabled("cuda", was_on)
        torch.set_autocast_dtype("cuda", was)
    assert features.dtype == torch.float32
    # They are not rounded to bf16 and back.
    assert not torch.equal(features, features.bfloat16().float())
    difference = ((features - exact).norm() / exact.norm()).item()
    assert 1e-4 < difference < 2e-2
