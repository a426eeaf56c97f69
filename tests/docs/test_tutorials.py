"""The program that docs/tutorials.md is made of runs, and says what the page says that it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "tutorials.md"


def test_the_page_is_a_program_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("2 clips of (4, 6, 6) tokens but masks for")
    assert printed[1:] == ["a token is both context and target"]
    masks = names["masks"]
    assert len(set(masks.target_lengths)) > 1, "all clips keep the same number: choose another seed"  # type: ignore
