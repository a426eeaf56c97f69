"""`vjepa-fast plan`: what it prints, and what it says to mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vjepa_fast.cli.main import app


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["plan", *args], prog_name="vjepa-fast", env={"COLUMNS": "200", "NO_COLOR": "1"})


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found[1])


def test_plan_of_a_recipe(tmp_path: Path) -> None:
    result = invoke("--recipe", "vitl16-256", "--gpu", "h200", "--gpus", "2", "--price", "3", "--loader-rate", "50")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout
    assert "24 blocks of 1024, 16 heads of 64, 303.9 M parameters" in text
    assert number(r"arithmetic +([\d.]+) TFLOP a clip", text) == pytest.approx(3.5466, rel=0.01)
    assert "(on in this config)" in text and "fits the 131 GiB of h200" in text
    assert "50.0 clips/s a GPU" in text and "waiting for the loader" in text
    hours = 3000 * 24 / 50 / 3600
    assert number(r"([\d.]+) GPU-hours", text) == pytest.approx(2 * hours, rel=0.1)
    assert number(r"cost +([\d.]+) at 3", text) == pytest.approx(2 * hours * 3, rel=0.01)
    rates = tmp_path / "gpu_run.json"
    rates.write_text(json.dumps({"limits": {"bytes_per_s": 4.3e12, "flops_per_s": 395e12}}))
    slow = invoke("--recipe", "vitl16-256", "--rates", str(rates))
    fast = invoke("--recipe", "vitl16-256")
    pattern = r"step +([\d.]+) ms,"
    assert number(pattern, slow.stdout) > 1.4 * number(pattern, fast.stdout)
    assert "Assumed, not measured: attention_flops_per_s, launch_s" in slow.stdout


def test_what_does_not_fit_and_plain_pytorch() -> None:
    big = invoke("--recipe", "vitl16-256", "--gpu", "rtx4090", "model.use_activation_checkpointing=false")
    assert "does not fit the 22 GiB of rtx4090" in big.stdout
    assert invoke("--plain").exit_code == 0


@pytest.mark.parametrize(("args", "said"), [
    (("--gpu", "h300"), "--gpu is 'h300'; known are b200, h200"),
    (("--rates", "nothing.json"), "--rates nothing.json: "),
    (("--gpus", "3", "--recipe", "demo"), "data.global_batch_size=16 is not a multiple of 3 processes; --gpus"),
])
def test_mistakes(args: tuple[str, ...], said: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
