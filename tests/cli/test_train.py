"""`vjepa-fast train`: what it passes on, what it prints, how it exits."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import vjepa_fast.train
from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config import Config, load_config, load_recipe, recipe_names, recipe_summary
from vjepa_fast.evaluation.demo import probe_run


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="vjepa-fast", env={"COLUMNS": "200", "NO_COLOR": "1"})


class Runs:
    """Stands in for the trainer and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Config, dict[str, Any]]] = []
        self.outcome: int | BaseException = 0

    def run(self, cfg: Config, finish: Any, **flags: Any) -> int:
        assert finish is probe_run
        self.calls.append((cfg, flags))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    stand_in = Runs()
    module = types.ModuleType("vjepa_fast.train.launch_run")
    module.run = stand_in.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vjepa_fast.train, "launch_run", module, raising=False)
    yield stand_in


def test_nothing_else_is_the_demo(runs: Runs) -> None:
    result = invoke("train")
    assert (result.exit_code, result.output) == (0, "")
    assert runs.calls == [(load_recipe("demo"), {"nproc": 1, "resume": False, "profile": False})]


def test_flags_and_overrides(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "a b: [c]"
    result = invoke(
        "train",
        "optimization.lr=1e-4",
        "--recipe",
        "vitl16-256",
        "--out",
        str(out),
        "--resume",
        "--nproc",
        "2",
        "--max-steps",
        "0",
        "--profile",
        "data.datasets=[a.csv]",
    )
    assert result.exit_code == 0
    ((cfg, flags),) = runs.calls
    assert flags == {"nproc": 2, "resume": True, "profile": True}
    assert (cfg.train.out, cfg.train.max_steps) == (out, 0)
    assert (cfg.optimization.lr, cfg.data.datasets, cfg.train.name) == (1e-4, ["a.csv"], "vitl16-256")


def test_config_file(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: demo\ntrain: {seed: 5}\n")
    assert invoke("train", "--config", str(file)).exit_code == 0
    assert runs.calls[0][0].train.seed == 5


@pytest.mark.parametrize("code", [0, 1, 130, 143])
def test_exit_code_of_the_trainer(code: int, runs: Runs) -> None:
    runs.outcome = code
    assert invoke("train").exit_code == code


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (UserError("disk [bold]full[/bold] [/]"), 1, "error: disk [bold]full[/bold] [/]\n"),
        (ConfigError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_of_the_trainer(outcome: BaseException, code: int, said: str, runs: Runs) -> None:
    runs.outcome = outcome
    result = invoke("train")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)


def test_a_defect_keeps_its_traceback(runs: Runs) -> None:
    runs.outcome = RuntimeError("a defect")
    result = invoke("train")
    assert result.exception is runs.outcome
    assert result.exit_code == 1


def test_print_config_prints_nothing_else(runs: Runs, tmp_path: Path) -> None:
    result = invoke("train", "--recipe", "vitl16-256", "--print-config", "optimization.lr=1e-5")
    assert (result.exit_code, result.stderr, runs.calls) == (0, "", [])
    file = tmp_path / "printed.yaml"
    file.write_text(result.stdout)
    assert load_config(file) == load_recipe("vitl16-256", ["optimization.lr=1e-5"])
    again = invoke("train", "--config", str(file), "--print-config")
    assert again.stdout == result.stdout


def test_warning_goes_to_stderr(runs: Runs, tmp_path: Path) -> None:
    printed = """
      {app: vjepa, nodes: 2, folder: /x, meta: {dtype: float32}, loss: {loss_exp: 1},
       data: {datasets: [a.csv], dataset_fpcs: [2], batch_size: 1, tubelet_size: 2, fps: 4, patch_size: 16},
       data_aug: {}, model: {model_name: vit_tiny, pred_depth: 1, pred_embed_dim: 8, use_mask_tokens: true},
       mask: [{spatial_scale: [0.5, 0.5], temporal_scale: [1, 1], aspect_ratio: [1, 1], num_blocks: 1}],
       optimization: {weight_decay: 0, final_weight_decay: 0, epochs: 1, warmup: 0, start_lr: 0, lr: 0, final_lr: 0,
                      ema: [1, 1]}}
    """
    file = tmp_path / "meta.yaml"
    file.write_text(printed)
    result = invoke("train", "--config", str(file), "--print-config")
    assert result.stderr == f"warning: {file}: ignored, nothing reads these: nodes\n"
    assert result.stdout.startswith("model:\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--recipe", "demoo"], "no recipe is called 'demoo'; did you mean demo?"),
        (["--recipe", "demo", "--config", "x.yaml"], "--recipe and --config are both given"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--config", "."], ". is a folder"),
        (["optimization.lrr=1"], "did you mean optimization.lr?"),
        (["vitl16.yaml"], "did you mean --config vitl16.yaml?"),
        (["vitl16-256"], "did you mean --recipe vitl16-256?"),
        (["resume"], "unexpected argument 'resume'; expected section.key=value"),
        (["--recipe", "vitl16-256"], "data.datasets is empty"),
        (["--nproc", "0"], "--nproc"),
        (["--max-steps", "-1"], "--max-steps"),
        (["--max-steps", "many"], "--max-steps"),
        (["--resum"], "--resume"),
    ],
)
def test_usage(args: list[str], said: str, runs: Runs) -> None:
    result = invoke("train", *args)
    assert (result.exit_code, result.stdout, runs.calls) == (2, "", [])
    assert said in result.stderr


def test_verbs() -> None:
    result = invoke("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.stderr
    assert "train" in invoke("--help").stdout
    assert invoke().exit_code == 2


def test_help_names_every_flag_and_recipe() -> None:
    text = invoke("train", "--help").stdout
    for word in (
        "--recipe",
        "--config",
        "--out",
        "--resume",
        "--nproc",
        "--max-steps",
        "--print-config",
        "--profile",
        "KEY=VALUE",
        "vitg16-256",
        "Examples:",
        "data.datasets=videos.csv",
        "Exit codes:",
    ):
        assert word in text, word


def test_recipes_are_listed_a_line_each() -> None:
    result = invoke("train", "--list-recipes")
    assert result.exit_code == 0
    head, *rows = [line.split(maxsplit=4) for line in result.output.splitlines()]
    assert head[:4] == ["recipe", "model", "pixels", "frames"]
    assert [row[0] for row in rows] == recipe_names()
    by_name = {name: rest for name, *rest in rows}
    assert by_name["vitl16-256"][:3] == ["vit_large", "256", "16"]
    assert by_name["vitg16-384-64f-cooldown"][:3] == ["vit_giant_xformers", "384", "64"]
    assert by_name["demo"][0] == load_recipe("demo").model.model_name


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_is_in_its_first_line(name: str) -> None:
    summary = recipe_summary(name)
    assert 20 < len(summary) <= 110 and summary[0].isupper()
    assert not summary.startswith("#") and not summary.endswith((".", ",", ":"))
