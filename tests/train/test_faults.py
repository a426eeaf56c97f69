"""Bad steps, roll-back, a checkpoint on request, memory that runs out, a run that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.tiny import tiny_config
from tests.helpers.trainer_fixtures import poison
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.cost import advice
from vjepa_fast.distributed import processes as distributed
from vjepa_fast.distributed import watchdog
from vjepa_fast.distributed.processes import Processes
from vjepa_fast.distributed.watchdog import Phase, Watchdog
from vjepa_fast.train.monitor import out_of_memory
from vjepa_fast.train.monitor.bad_steps import BadSteps
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_steps_r0.jsonl").read_text().splitlines()]


def test_back_to_the_last_checkpoint_and_on_behind_the_bad_steps(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make("train.rollback_after=3", "train.max_steps=14", "train.log_every=1")
    poison(trainer, range(7, 10))
    weights: dict[int, torch.Tensor] = {}
    original = trainer.run_step

    def run_step(batch: Any) -> Any:
        weights[trainer.step] = trainer.model.encoder.blocks[0].attn.qkv.weight.detach().clone()
        return original(batch)

    trainer.run_step = run_step  # type: ignore[method-assign]
    trainer.fit()
    # The checkpoint of step 9 was due among the bad ones, so that of step 6 is the last.
    assert torch.equal(weights[10], weights[6])
    assert not torch.equal(weights[10], weights[7])
    assert not torch.equal(weights[11], weights[10])
    said = capsys.readouterr().out
    assert "no checkpoint at step 9: the last 2 steps were bad" in said or "back to the weights of step 6" in said
    assert "the last 3 steps up to step 10 were bad" in said and "this is time 1 of at most 3" in said
    rows = listed(tmp_path / "run")
    assert [row["step"] for row in rows] == [7, 8, 9]
    assert rows[0]["sample_ids"] == [28, 29, 30, 31] and rows[0]["skipped"]
    assert trainer.step == 14


def test_going_back_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa_fast.train.monitor.recovery.MAX_SKIPPED", 5)
    trainer = make("train.rollback_after=2", "train.max_rollbacks=2", "train.log_every=1")
    poison(trainer, range(4, 1000))
    with pytest.raises(UserError, match=r"finite.*\b5 steps.*\bstep 13\b.*\b2 times"):
        trainer.fit()


def test_spikes(tmp_path: Path) -> None:
    steps = BadSteps(tmp_path, 0, spike_factor=2.0)
    ids = [torch.tensor([4, 5])]
    # Too early to know what is much.
    steps.observe(0, 9.0, 1.0, False, ids)
    for step in range(1, 60):
        steps.observe(step, 0.5, 1.0, False, ids)
    steps.observe(60, 1.9, 1.0, False, ids)
    steps.observe(61, float("nan"), 1.0, False, ids)
    assert steps.in_a_row == 2
    assert [(row["step"], row["loss"], row["sample_ids"]) for row in listed(tmp_path)] == [
        (60, 1.9, [4, 5]),
        (61, "nan", [4, 5]),
    ]
    steps.observe(62, 0.8, 1.0, False, ids)
    assert steps.in_a_row == 0
    without = BadSteps(tmp_path / "b", 0, spike_factor=None)
    for step in range(40):
        without.observe(step, 0.5 if step < 39 else 100.0, 1.0, False, ids)
    assert without.in_a_row == 0


def test_checkpoint_on_request(make: Make) -> None:
    """SIGUSR1 during a step: a checkpoint after the next one, and the run goes on."""
    trainer = make("train.checkpoint_every=100", "train.max_steps=8")
    written: list[int] = []
    write, run_step = trainer.writer.write, trainer.run_step

    def watched(contents: dict[str, Any], step: int, also: Path | None = None) -> None:
        written.append(step)
        write(contents, step, also)

    def signalled(batch: Any) -> Any:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return run_step(batch)

    trainer.writer.write = watched  # type: ignore[method-assign]
    trainer.run_step = signalled  # type: ignore[method-assign]
    assert trainer.fit().exit_code == 0
    assert written == [4, 8]


def big(*changes: str) -> Config:
    return tiny_config(
        Path("list.csv"),
        Path("cache"),
        "model.depth=12",
        "model.embed_dim=192",
        "data.crop_size=64",
        "data.global_batch_size=8",
        "model.num_heads=3",
        *changes,
    )


def test_what_helps_when_memory_runs_out(make: Make) -> None:
    trainer = make()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    trainer.task._run = full  # type: ignore[assignment]
    with pytest.raises(
        UserError,
        match=r"ran out in step 0; predicted for this config: 0.0 GiB a process. "
        r"With train.dtype=.*checkpointing=full: .*grad_accumulation=2, which",
    ):
        trainer.fit()


def test_predictions_of_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (out_of_memory, advice):
        monkeypatch.setattr(module, "_GIB", 2**20)
    said = out_of_memory.explain(big(), 8, torch.device("cpu"), 3)
    now, *rest = [float(number) for number in re.findall(r"([\d.]+) GiB", said)]
    assert len(rest) == 4 and all(0 < figure < now for figure in rest)
    least = out_of_memory.explain(
        big("model.activation_checkpointing=full", "optimization.grad_accumulation=8", "train.dtype=bfloat16"),
        8,
        torch.device("cpu"),
        3,
    )
    assert least.endswith("Use fewer clips a process or a smaller model")


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"), True),
    ],
)
def test_which_errors_are_of_memory(error: BaseException, out: bool) -> None:
    assert out_of_memory.is_out_of_memory(error) is out


def test_watchdog_of_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left: list[tuple[int, BaseException]] = []
    gone = threading.Event()

    def leave(rank: int, error: BaseException) -> None:
        left.append((rank, error))
        dog._stop.set()
        gone.set()

    monkeypatch.setattr(distributed, "leave", leave)
    # A clock of its own: on a busy machine nobody knows how long a pause is.
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(watchdog, "time", clock)
    dog = Watchdog(Processes(torch.device("cpu")), 0.4)
    dog.start()
    for step in range(5):
        # Slow, but not stuck.
        dog.at(step, Phase.STEP)
        clock.now += 0.3
        time.sleep(0.15)
    assert not left
    dog.at(10, Phase.CLIPS)
    clock.now += 0.5
    assert gone.wait(10)
    dog.stop()
    assert str(left[0][1]) == (
        "no progress for 0.4 s (train.watchdog): step 10, waiting for clips. The stacks are "
        "above; continue with --resume"
    )
    error = capsys.readouterr().err
    assert "process 0 of 1 has been at step 10, waiting for clips, for" in error
    assert "gone.wait(10)" in error


def test_who_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(torch.device("cpu"))
    processes.distributed, processes.world_size = True, 3
    dog = Watchdog(processes, 1.0)
    places = {0: (7, 1), 1: (7, 1), 2: (7, 1)}
    monkeypatch.setattr(dog, "_places", lambda step, phase: places)
    assert dog._who(7, Phase.OTHERS) == "all processes are at step 7, waiting for the other processes"
    places[1] = (7, 0)
    assert dog._who(7, Phase.OTHERS) == (
        "stuck at step 7, waiting for clips: process 1 of 3, for which the others wait"
    )
    del places[1], places[2]
    assert dog._who(7, Phase.OTHERS) == "no answer at all from processes 1, 2 of 3"


def test_no_watchdog_unless_asked_for() -> None:
    dog = Watchdog(Processes(torch.device("cpu")), None)
    dog.start()
    assert dog._thread is None
    dog.stop()
