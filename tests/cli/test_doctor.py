"""`vjepa-fast doctor`: one line a subject, exit code 1 only where something is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.ops.attention import stand_ins
from vjepa_fast.cli.main import app
from vjepa_fast.common import extension
from vjepa_fast.masking import mask_sample
from vjepa_fast.ops.attention import cache, choice
from vjepa_fast.ops.attention import op as ops_attention
from vjepa_fast.ops.attention.backends import adapter


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    extension.load.cache_clear()
    yield
    extension.load.cache_clear()


def run() -> Result:
    return CliRunner().invoke(app, ["doctor"])


def line(result: Result, subject: str) -> str:
    return next(text for text in result.stdout.splitlines() if text[9:].startswith(subject))


def test_says_what_is_there() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert torch.__version__ in line(result, "torch")
    assert "h264" in line(result, "video")
    assert "data.backend=auto is " in line(result, "DALI")
    if extension.load().path is not None:
        assert line(result, "extension").startswith("ok")
        assert line(result, "masks").endswith("cpu: drawn by the extension, equal to the definition")


def test_extension_that_was_not_built_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.so")
    result = run()
    assert result.exit_code == 0
    assert line(result, "extension").startswith("note     extension  not loaded:")
    assert "does not exist" in line(result, "extension")
    assert "drawn by NumPy" in line(result, "masks")


def test_extension_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_text("no library")
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.so")
    result = run()
    assert result.exit_code == 1
    assert line(result, "extension").startswith("problem")
    assert "does not load" in line(result, "extension")


def test_wrong_masks_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension.load().path is None:
        pytest.skip("the extension is not built")
    right = mask_sample.mask_sample

    def wrong(*args: object, **kwargs: object) -> mask_sample.PackedMasks:
        drawn = right(*args, **kwargs)  # type: ignore[arg-type]
        drawn.context_ids[0] += 1
        return drawn

    monkeypatch.setattr(mask_sample, "mask_sample", wrong)
    result = run()
    assert result.exit_code == 1
    assert "NOT equal" in line(result, "masks")


def attention(result: Result) -> list[str]:
    return [text for text in result.stdout.splitlines() if text[9:].startswith("attention")]


def test_attention_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.delenv("VJEPA_FAST_ATTENTION", raising=False)
    lines = attention(run())
    assert len(lines) == 6 and lines[-1].endswith("chosen: sdpa, the only candidate on the CPU")
    assert any(f"varlen (torch {torch.__version__}): not used: torch finds no CUDA device" in text for text in lines)
    for value, level, text in (
        ("sdpa", "ok", "chosen: sdpa, by VJEPA_FAST_ATTENTION=sdpa"),
        ("fa2", "problem", "VJEPA_FAST_ATTENTION=fa2 cannot be used: torch finds no CUDA"),
        ("fast", "problem", "VJEPA_FAST_ATTENTION=fast is not an attention back end"),
    ):
        monkeypatch.setenv("VJEPA_FAST_ATTENTION", value)
        result = run()
        assert attention(result)[-1].startswith(level) and text in attention(result)[-1]
        assert result.exit_code == (level == "problem")


def test_attention_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With stand-ins on the CPU, one of them wrong."""
    names = ("fa4", "fa2")
    with stand_ins.only(monkeypatch, names, tmp_path):
        device = torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr("vjepa_fast.cli.doctor._first_gpu", lambda: device)
        wrong = adapter("fa2")
        assert not isinstance(wrong, str)
        wrong = wrong._replace(backward=lambda *args: None)
        monkeypatch.setattr(ops_attention, "adapter", lambda name: wrong if name == "fa2" else adapter(name))
        first = attention(run())
        cache.store(
            choice.stamp(device) + "; bf16, head dim 64", cache.Choice("fa4", {"sdpa": 2.5, "fa4": 1.25}, {}), ["fa4"]
        )
        second = attention(run())
    assert "fa4 (flash-attn-4 4.0.0b36): usable, equal to the definition" in first[0] and first[0].startswith("ok")
    assert first[1].startswith("note") and first[1].endswith("fa3: not used: flash_attn_3 is not installed")
    assert first[2].startswith("note") and "not used: its gradient is wrong" in first[2]
    assert first[-1].endswith(f"by a short measurement at the first use, kept in {tmp_path / 'attention.json'}")
    assert second[-2].endswith("chosen: fa4 for bf16, head dim 64, as measured: fa4 1.25 ms, sdpa 2.5 ms")


def test_torch_outside_the_tested_range_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa_fast.cli.doctor._accepted_torch", lambda: ">=99")
    result = run()
    assert result.exit_code == 0
    assert line(result, "torch").startswith("note")
