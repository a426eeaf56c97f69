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
    assert number(r"arithmetic +([\d.]+) TFLOP a clip", text) == pytest.approx(3.5466, rel=0.02)
    assert "activation checkpointing full, 1 micro-batch" in text
    assert "fits the 120.8 GiB that can be used of the 131.3 of h200" in text
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


def test_duration_for_some_data() -> None:
    text = invoke(
        "--recipe",
        "vitl16-256",
        "--gpus",
        "2",
        "--gpu",
        "a100-80gb",
        "--videos",
        "4800000",
        "--price",
        "3",
        "optimization.ipe=null",
    ).stdout
    assert "4.8 M videos: once through them in 100000 steps, " in text and "schedule      1000000 steps" in text
    once, all_epochs = (float(hours) for hours in re.findall(r"([\d.]+) h ", text))
    assert all_epochs == pytest.approx(10 * once, rel=0.01)
    assert number(r"\(([\d.]+) days\) on 2 GPUs", text) == pytest.approx(all_epochs / 24, abs=0.06)


def test_what_does_not_fit_says_what_would() -> None:
    text = invoke("--recipe", "vitl16-256", "--gpu", "rtx4090", "model.use_activation_checkpointing=false").stdout
    over = number(r"does not fit the 20.6 GiB that can be used of the 22.4 of rtx4090, by ([\d.]+) GiB", text)
    assert over > 1
    for setting in (
        "model.activation_checkpointing=full",
        r"optimization.grad_accumulation=\d+, which changes no loss",
    ):
        assert number(rf"fits with {setting}: ([\d.]+) GiB", text) < 20.6
    both = invoke("--recipe", "vitg16-256", "--gpu", "a100-40gb", "model.use_activation_checkpointing=false").stdout
    assert "fits with model.activation_checkpointing=" in both and "optimization.grad_accumulation=" in both
    none = invoke("--recipe", "vitg16-256", "--gpu", "rtx4080").stdout
    assert "no setting is enough (least with " in none and "several GPUs (--gpus)" in none


def test_plain_pytorch() -> None:
    assert invoke("--plain").exit_code == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--gpu", "h20"), "--gpu is 'h20'; did you mean h200? known are b200, h200"),
        (("--gpu", "RTX 4900"), "did you mean rtx4090?"),
        (("--gpu", "a100"), "did you mean a100-80gb or a100-40gb?"),
        (("--recipe", "vitl-256"), "did you mean vitl16-256?"),
        (("model.target_precision=float8", "--gpu", "a100-80gb"), "float8, which a100-80gb has no matrix units for"),
        (("--rates", "nothing.json"), "--rates nothing.json: "),
        (("--gpus", "3", "--recipe", "demo"), "data.global_batch_size=16 is not a multiple of 3 processes; --gpus"),
    ],
)
def test_mistakes(args: tuple[str, ...], said: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
