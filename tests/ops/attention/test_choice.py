"""How an attention back end is chosen: by demand, by measuring, by what is on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.attention import stand_ins
from tests.ops.attention.cases import by_loop, draw, ours, pack
from tests.ops.attention.plain import plain_forward
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.ops.attention import backends, cache, choice
from vjepa_fast.ops.attention import op as module
from vjepa_fast.ops.attention.op import attention, select_backend
from vjepa_fast.ops.packing import Packing

LIBRARIES = tuple(backends.BACKENDS)
pytestmark = pytest.mark.usefixtures("own_attention_cache")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, float]]:
    """All libraries are there; their times are what the test says. The keys are those that were timed, in order."""
    times = {"fa4": 5.0, "fa3": 4.0, "fa2": 2.0, "varlen": 1.98, "xformers": 3.0, "sdpa": 9.0}
    running: list[str] = []
    attend = module._attend

    def watched(qkv: Tensor, packing: Packing, heads: int, name: str, deterministic: bool) -> Tensor:
        running.append(name)
        return attend(qkv, packing, heads, name, deterministic)

    def time_ms(call, device: torch.device) -> float:
        call()
        return times[running[-1]]

    with stand_ins.only(monkeypatch, LIBRARIES, tmp_path):
        monkeypatch.setattr(module, "_attend", watched)
        monkeypatch.setattr(choice, "time_ms", time_ms)
        times["measured"] = 0.0
        measure = choice._measure
        monkeypatch.setattr(
            choice, "_measure", lambda *args: (times.update(measured=times["measured"] + 1), measure(*args))[1]
        )
        yield times


PACKING = pack((20, 30, 30))


def pick(dtype: torch.dtype = torch.float32, packing: Packing = PACKING, requested: str | None = None) -> str:
    return select_backend(packing, 2, 16, dtype, True, requested)


def test_the_fastest_wins_once(timed: dict[str, float]) -> None:
    # varlen is faster than fa2 by less than noise.
    assert pick() == "fa2" and timed["measured"] == 1
    timed["fa4"] = 0.1
    qkv, grad = draw(PACKING, 2, 16)
    assert pick() == "fa2" and timed["measured"] == 1
    torch.testing.assert_close(ours(qkv, grad, PACKING, 2)[1], by_loop(qkv, grad, PACKING, 2)[1])
    assert timed["measured"] == 1
    # Other lengths are another case, and so is a pass without backward.
    assert pick(packing=pack((20, 33))) == "fa4" and timed["measured"] == 2
    assert select_backend(PACKING, 2, 16, torch.float32, False) == "fa4" and timed["measured"] == 3


def test_the_file_serves_the_next_process(timed: dict[str, float], tmp_path: Path) -> None:
    assert pick() == "fa2"
    stand_ins.forget()
    timed["fa4"] = 0.1
    assert pick() == "fa2" and timed["measured"] == 1
    file = cache.cache_file()
    assert file.parent == tmp_path and list(tmp_path.glob("tmp*")) == []
    foreign = file.read_text().replace('"format": 2', '"format": 1')
    for broken in (foreign, "", "[1, 2]", '{"format": 99, "choices": {}}', '{"format": 2, "choices": {"a": 3}}', "\0"):
        stand_ins.forget()
        timed["measured"] = 0
        file.write_text(broken)
        assert pick() == "fa4" and timed["measured"] == 1
        assert [one.name for one in cache.read().values()] == ["fa4"]


def test_other_versions_are_measured_again(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick() == "fa2"
    stand_ins.forget()
    timed["fa4"] = 0.1
    monkeypatch.setitem(stand_ins.VERSIONS, "flash-attn-4", "4.0.0b37")
    versions = {backend.package: stand_ins.VERSIONS.get(backend.package) for backend in backends.BACKENDS.values()}
    monkeypatch.setattr(backends, "installed_version", {**versions, "torch": torch.__version__}.get)
    assert pick() == "fa4" and len(cache.read()) == 2


def test_the_first_of_several_processes_decides(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = choice._measure

    def slowly(*args):
        """Another process finishes first."""
        monkeypatch.setattr(choice, "_measure", measure)
        timed["fa3"] = 0.1
        assert pick() == "fa3"
        choice._chosen.clear()
        timed["fa3"] = 4.0
        return measure(*args)

    monkeypatch.setattr(choice, "_measure", slowly)
    assert pick() == "fa3" and timed["measured"] == 2


def test_a_folder_that_cannot_be_written(timed: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "attention.lock").mkdir()
    assert pick() == "fa2" and not cache.cache_file().exists()


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    return plain_forward(q, k, v, cu, longest, 1.05 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wrong_results_and_failures_are_dropped(
    timed: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = backends.adapter

    def adapter(name: str) -> backends.Adapter | str:
        found = real(name)
        assert not isinstance(found, str)
        if name == "fa2":
            return found._replace(forward=wrong_scale)
        if name == "fa4":
            return found._replace(backward=lambda *args: None)
        return found._replace(forward=lambda *args: 1 / 0) if name == "varlen" else found

    monkeypatch.setattr(module, "adapter", adapter)
    with pytest.warns(UserWarning) as said:
        assert pick(dtype) == "xformers"
    texts = sorted(str(one.message) for one in said)
    assert "fa2 is not used" in texts[0] and "its output is wrong" in texts[0]
    assert "fa4 is not used" in texts[1] and "its gradient is wrong" in texts[1]
    assert "varlen is not used" in texts[2] and "ZeroDivisionError" in texts[2]
    for _ in range(2):
        with pytest.raises(UserError, match=r"model\.attention=fa2.*output.*wrong.*auto, fa4"):
            pick(dtype, requested="fa2")


def test_environment_before_config(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(requested="xformers") == "xformers" and not timed["measured"]
    monkeypatch.setenv(choice.VARIABLE, "fa3")
    assert pick(requested="xformers") == "fa3" and pick() == "fa3"
    monkeypatch.setenv(choice.VARIABLE, "auto")
    assert pick(requested="xformers") == "fa2"
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(UserError, match="VJEPA_FAST_ATTENTION=fast.*auto, fa4"):
        pick(requested="xformers")


def test_measuring_within_a_recomputed_block(timed: dict[str, float]) -> None:
    state = torch.get_rng_state()
    qkv, grad = draw(PACKING, 2, 16)
    with torch.autocast("cpu"):
        out = checkpoint(lambda x: attention(x, PACKING, 2), qkv, use_reentrant=False)
    assert timed["measured"] == 1
    torch.testing.assert_close(torch.autograd.grad(out, qkv, grad)[0], by_loop(qkv, grad, PACKING, 2)[1])
    # Within a backward pass nothing is measured.
    other, weight = draw(pack((70,)), 2, 16)
    out = checkpoint(lambda x: attention(x, pack((70,)), 2), other, use_reentrant=True)
    torch.autograd.backward(out, weight)
    assert timed["measured"] == 2 and torch.equal(torch.get_rng_state(), state)


def test_traced_regions_take_what_was_measured(timed: dict[str, float]) -> None:
    case = choice.Case(torch.device("cpu"), torch.float32, 16, 2, True, False)
    assert choice.without_measuring(case, None) == "varlen" and not timed["measured"]
    assert pick() == "fa2" and choice.without_measuring(case, None) == "fa2"


def test_versions_and_signatures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with stand_ins.only(monkeypatch, ("fa4", "fa2"), tmp_path):
        assert backends.BACKENDS["fa3"].missing() == "flash_attn_3 is not installed"
        assert backends.BACKENDS["fa4"].missing() is None
        stand_ins.forget()
        stand_ins.install(monkeypatch, "fa4", _flash_attn_fwd=lambda q, k, v, pages: None)
        assert "no cu_seqlens_q" in str(backends.BACKENDS["fa4"].missing())
        assert "a pages that must be given" in str(backends.BACKENDS["fa4"].missing())
        stand_ins.install(monkeypatch, "fa2", _flash_attn_varlen_forward=None)
        assert "AttributeError" in str(backends.BACKENDS["fa2"].missing())
        monkeypatch.setattr(backends, "installed_version", {"flash-attn": "2.6.3", "flash-attn-4": "4.0.0b18"}.get)
        assert backends.BACKENDS["fa2"].missing() == "flash-attn 2.6.3 is installed, but >=2.7,<3 is needed"
        assert "4.0.0b18 is installed" in str(backends.BACKENDS["fa4"].missing())


def test_what_a_back_end_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    fa4, half, cuda = backends.BACKENDS["fa4"], torch.bfloat16, torch.device("cuda", 0)

    def refused(device=cuda, dtype=half, head_dim=64, backward=True, deterministic=False) -> str:
        return str(fa4.refuses(device, dtype, head_dim, backward, deterministic))

    assert "the tensors are on cpu" in refused(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "installed_version", lambda package: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "the device has 8.6" in refused()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "bfloat16 and float16, not float32" in refused(dtype=torch.float32)
    assert "not 36" in refused(head_dim=36) and "not 136" in refused(head_dim=136)
    assert "not deterministic" in refused(deterministic=True)
    assert refused(deterministic=True, backward=False) == refused() == "flash-attn-4 is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "does not compile for head dim 104" in refused(head_dim=104)
    assert refused(head_dim=104, backward=False) == refused(deterministic=True) == "flash-attn-4 is not installed"


def test_a_demand_that_cannot_be_met() -> None:
    words = "model.attention=fa2 cannot be used for float32, head dim 8.*on cpu; use auto, sdpa"
    with pytest.raises(UserError, match=words):
        attention(torch.zeros(3, 48), pack((3,)), 2, "fa2")
    with pytest.raises(UserError, match="lengths that only the device knows: .*sdpa: it needs lengths"):
        attention(torch.zeros(3, 48), pack((3,), dynamic=True), 2)


def test_the_config_knows_the_names() -> None:
    assert get_args(ModelConfig.model_fields["attention"].annotation) == ("auto", *backends.NAMES)
