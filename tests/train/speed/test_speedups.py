"""`auto`: what is measured, what is chosen, and that a run learns the same whatever was tried out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.graphed import batch, config, train_step
from tests.helpers.tiny import tiny_config
from vjepa_fast.models import compiled_blocks
from vjepa_fast.train.speed import speedups
from vjepa_fast.train.speed.timing_trials import race, restoring_state
from vjepa_fast.train.step import TrainStep
from vjepa_fast.train.trainer import Trainer

# Measuring takes seconds each time.
pytestmark = pytest.mark.slow


def everything(step: TrainStep) -> dict[str, object]:
    """All that a step may write to."""
    optimizer = step.optimizer.state_dict()
    return copy.deepcopy(
        {
            "weights": dict(step.model.state_dict()),
            "moments": optimizer["state"],
            "groups": optimizer["param_groups"],
            "scaler": step.scaler and step.scaler.state_dict(),
            "generator": torch.get_rng_state(),
            "figures": (step.optimizer.grad_norm, step.optimizer.skipped),
            "gradients": [name for name, p in step.model.named_parameters() if p.grad is not None],
        }
    )


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("begun", [False, True])
def test_steps_are_undone_to_the_bit(dtype: str, begun: bool) -> None:
    cfg = config(dtype, drop_path_rate=0.5)
    ours, oracle = train_step(cfg), train_step(cfg)
    for number in range(3 * begun):
        for step in (ours, oracle):
            torch.manual_seed(number)
            step(number, *batch(number, cfg))
    torch.manual_seed(7)
    before = everything(ours)
    with restoring_state(ours):
        for number in range(3):
            ours(10 + number, *batch(number, cfg))
        assert not equal(everything(ours), before)
    assert equal(everything(ours), before)
    for number in range(3, 5):
        for step in (ours, oracle):
            torch.manual_seed(number)
            step(number, *batch(number, cfg))
    assert equal(everything(ours), everything(oracle))


def test_steps_that_fail_are_undone_too() -> None:
    cfg = config()
    step = train_step(cfg)
    before = everything(step)
    with pytest.raises(ZeroDivisionError), restoring_state(step):
        step(0, *batch(0, cfg))
        raise ZeroDivisionError
    assert equal(everything(step), before)


def test_sides_take_turns() -> None:
    order: list[tuple[str, int]] = []
    sides = {name: lambda number, name=name: order.append((name, number)) for name in "ab"}
    assert race(sides, torch.device("cpu"), 2).keys() == sides.keys()
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


Make = Callable[..., Trainer]


@pytest.fixture
def make(video_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A run of four steps; nothing is compiled to machine code, which would take a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled_blocks, "_compiled", {})

    def build(name: str, *changes: str) -> Trainer:
        (tmp_path / name).mkdir()
        return Trainer(
            tiny_config(
                video_csv,
                tmp_path / "cache",
                "train.max_steps=4",
                "train.log_every=1",
                "train.dtype=bfloat16",
                *changes,
            ),
            folder=tmp_path / name,
        )

    return build


def fitted(trainer: Trainer) -> tuple[dict[str, torch.Tensor], float]:
    loss = trainer.fit().loss
    return dict(trainer.model.state_dict()), loss


def seconds(with_it: float, without: float) -> Callable[..., dict[str, float]]:
    """A race with these results; its sides have still run."""

    def run(sides: dict, device: torch.device, rounds: int) -> dict[str, float]:
        race(sides, device, 1)
        return {"with": with_it, "without": without}

    return run


def test_a_run_is_the_same_whatever_was_measured(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = fitted(make("plain"))
    capsys.readouterr()
    monkeypatch.setattr(speedups, "race", seconds(1.0, 1.0))
    measured = fitted(make("measured", "model.compile_model=auto", "train.cuda_graphs=auto"))
    said = " ".join(capsys.readouterr().out.split())
    assert compiled_blocks._compiled, "nothing was tried out"
    assert "model.compile_model=auto: compiled blocks are not used, 1000 ms a step with and 1000 ms without" in said
    assert "cuda_graphs" not in said, "the default, which is not about anything on a CPU"
    assert equal(plain, measured)


def test_what_is_faster_is_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedups, "race", seconds(1.0, 1.05))
    trainer = make("auto", "model.compile_model=auto")
    weights, loss = fitted(trainer)
    assert all(block.compiled for block in trainer.model.encoder.blocks)
    always = make("always", "model.compile_model=true")
    assert equal((weights, loss), fitted(always))


def test_without_a_compiler(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(device: torch.device) -> None:
        raise compiled_blocks.NotCompiled("no C++ compiler was found")

    monkeypatch.setattr(speedups, "require_compiler", missing)
    plain, measured = fitted(make("plain")), fitted(make("measured", "model.compile_model=auto"))
    assert "blocks are not compiled: no C++ compiler was found" in " ".join(capsys.readouterr().out.split())
    assert equal(plain, measured)


def test_graphs_are_measured_where_they_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race itself, with steps that only count."""
    runs: list[str] = []

    class Counted:
        stopped = False

        def __init__(self, step: TrainStep, expected: list, say: Callable[[str], object]) -> None:
            self.expected = expected

        def __call__(self, *_: object) -> None:
            runs.append("graphed")

    cfg = config()
    cfg.train.cuda_graphs = "auto"
    step = train_step(cfg)
    before = everything(step)
    said: list[str] = []
    monkeypatch.setattr(speedups, "refusal", lambda *_: None)
    monkeypatch.setattr(speedups, "GraphedStep", Counted)
    trials = [speedups.Trial(number, *([part] for part in batch(number, cfg))) for number in range(2)]
    processes = speedups.Processes(torch.device("cpu"))
    for times, kind in (((1.0, 2.0), Counted), ((2.0, 1.0), TrainStep)):
        monkeypatch.setattr(speedups, "race", seconds(*times))
        chosen = speedups.SpeedUps(cfg, step, processes, said.append).choose(trials, [], 1, False)
        assert type(chosen) is kind
    assert said == [
        "train.cuda_graphs=auto: CUDA graphs are used, 1000 ms a step with and 2000 ms without",
        "train.cuda_graphs=auto: CUDA graphs are not used, 2000 ms a step with and 1000 ms without",
    ]
    assert runs.count("graphed") == 2 * (3 * len(trials) + 1)
    assert equal(everything(step), before)
    # Graphs that gave up on the way ran eagerly, however the times came out.
    monkeypatch.setattr(speedups, "race", seconds(1.0, 2.0))
    monkeypatch.setattr(Counted, "stopped", True)
    assert speedups.SpeedUps(cfg, step, processes, said.append).choose(trials, [], 1, False) is step

    # A long step is not raced: the launches are a small part of it.
    monkeypatch.setattr(speedups, "LONG_STEP", 0.0)
    raced = len(runs)
    assert speedups.SpeedUps(cfg, step, processes, said.append).choose(trials, [], 1, False) is step
    assert "CUDA graphs are not tried" in said[-1] and len(runs) == raced and equal(everything(step), before)
    monkeypatch.setattr(speedups, "LONG_STEP", 60.0)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speedups, "race", out_of_memory)
    assert speedups.SpeedUps(cfg, step, processes, said.append).choose(trials, [], 1, False) is step
    assert "do not fit in memory" in said[-1] and equal(everything(step), before)
    cfg.train.cuda_graphs = True
    profiled = speedups.SpeedUps(cfg, step, processes, said.append).choose(trials, [], 1, True)
    assert profiled is step and "single operators" in said[-1]


@pytest.mark.gpu
def test_auto_on_a_gpu() -> None:
    cfg = config("bfloat16", drop_path_rate=0.5)
    cfg.model.compile_model = cfg.train.cuda_graphs = "auto"
    step = train_step(cfg, "cuda")
    for number in range(2):
        step(number, *batch(number, cfg, "cuda"))
    before, generator = everything(step), torch.cuda.get_rng_state()
    said: list[str] = []
    trials = [speedups.Trial(number, *([part] for part in batch(number, cfg, "cuda"))) for number in range(4)]
    processes = speedups.Processes(torch.device("cuda"))
    chosen = speedups.SpeedUps(cfg, step, processes, said.append).choose(
        trials, [speedups.Sizes.of(trial.masks[0]) for trial in trials], 1, False
    )
    assert [sentence.partition(":")[0] for sentence in said] == ["model.compile_model=auto", "train.cuda_graphs=auto"]
    assert all("ms a step with and" in sentence for sentence in said), said
    # With so small a model nearly all of a step is launches.
    assert isinstance(chosen, speedups.GraphedStep), said
    assert equal(everything(step), before) and torch.equal(torch.cuda.get_rng_state(), generator)
    losses = [float(chosen(number, *batch(number, cfg, "cuda")).loss) for number in range(2, 12)]
    assert all(0 < loss < 2 for loss in losses) and chosen.num_replayed > 0


@pytest.mark.gpu
def test_a_run_with_graphs(video_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    trainer = Trainer(
        tiny_config(
            video_csv,
            tmp_path / "cache",
            "train.device=cuda",
            "train.dtype=bfloat16",
            "train.max_steps=20",
            "train.cuda_graphs=true",
        ),
        folder=tmp_path / "run",
    )
    summary = trainer.fit()
    assert summary.step == 20 and 0 < summary.loss < 2
    assert isinstance(trainer.task._run, speedups.GraphedStep) and trainer.task._run.num_replayed > 0
    checkpoint = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    assert {float(state["step"]) for state in checkpoint["opt"]["state"].values()} == {20.0}
