"""docs/tutorials.md runs as written, trains with the loss it promises, and prints what it claims."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "tutorials.md"


def test_the_page_is_a_program_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    # Half a squared error, an L2 penalty and a variance term: the table at the top of the page.
    promised = {"loss_exp": 2.0, "prediction_l2": 0.01, "reg_coeff": 0.1}
    options = names["model"].loss_options
    assert {name: options[name] for name in promised} == promised
    out, weights = names["out"], names["masks"].token_weights()
    errors = (out.packed_predictions - out.packed_targets).square().mean(-1) / 2
    penalty = 0.01 * out.packed_predictions.square().mean(-1) / 2
    without_variance = float(((errors + penalty) * weights).sum())
    assert without_variance < float(out.loss) < without_variance + 0.1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("2 clips of (4, 6, 6) tokens but masks for")
    assert printed[1:] == ["a token is both context and target"]
    masks = names["masks"]
    assert len(set(masks.target_lengths)) > 1, "all clips keep the same number: choose another seed"  # type: ignore
