"""`vjepa-fast doctor`: one line a subject, exit code 1 only where something is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from vjepa_fast import extension
from vjepa_fast.cli.main import app
from vjepa_fast.ops import mask_sample


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


def test_torch_outside_the_tested_range_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa_fast.cli.doctor._accepted_torch", lambda: ">=99")
    result = run()
    assert result.exit_code == 0
    assert line(result, "torch").startswith("note")
