"""The training loop trains what is no V-JEPA: a line through points, with logs, checkpoints and resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.train.task import RunContext
from vjepa_fast.train.trainer import Trainer


@dataclass
class Points:
    step: int
    sample_ids: list[Tensor]
    x: Tensor

    @property
    def num_samples(self) -> int:
        return len(self.x)


class PointStream:
    """Batch n is a function of n."""

    num_tried = 0

    def __init__(self) -> None:
        self.step = 0

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def __iter__(self) -> Iterator[Points]:
        while True:
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(self.step))
            yield Points(self.step, [torch.arange(8)], x)
            self.step += 1

    def broken(self) -> list[Any]:
        return []

    def close(self) -> None:
        pass


@dataclass
class Outcome:
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    schedule: dict[str, float]


class Line:
    """y = 2 x + 1."""

    in_shards = False

    def __init__(self, context: RunContext) -> None:
        torch.manual_seed(0)
        self.context = context
        self.model, self.loader = nn.Linear(1, 1), PointStream()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.watched: list[Mapping[str, float | None]] = []
        self.said: list[str] = []

    def run_step(self, batch: Points) -> Outcome:
        loss = (self.model(batch.x) - 2 * batch.x - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()
        self.optimizer.step()
        schedule = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}
        return Outcome(loss.detach(), norm, torch.zeros(()), schedule)

    def announce(self) -> None:
        self.said.append("announced")

    def about(self) -> dict[str, Any]:
        return {"what": "a line"}

    def rewind_health(self, jsonl_path: Path) -> None:
        assert jsonl_path.exists()

    def metrics(self, outcome: Outcome) -> dict[str, float]:
        return {"slope": self.model.weight.item()}

    def watch(self, row: Mapping[str, float | None]) -> None:
        self.watched.append(row)

    def verdict(self) -> None:
        self.said.append("judged")

    def collect(self) -> None:
        pass

    def contents(self, step: int, loss: float) -> dict[str, Any]:
        own = {"step": step, "config": self.context.cfg.model_dump(mode="json")}
        return {
            "model": self.model.state_dict(),
            "opt": self.optimizer.state_dict(),
            "loss": loss,
            "epoch": 0,
            "vjepa_fast": own,
        }

    def load(self, path: Path) -> dict[str, Any]:
        saved = torch.load(path)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["opt"])
        return saved

    def load_state(self, own: Mapping[str, Any]) -> None:
        self.said.append(f"at {own['step']}")

    def roll_back_state(self, own: Mapping[str, Any]) -> None:
        pass

    def skip_to(self, step: int) -> None:
        raise AssertionError("all checkpoints have the entry")

    def take_weights(self, path: Path) -> str:
        return ""

    def changes(self, own: Mapping[str, Any]) -> list[str]:
        return ["points a step 8 -> 9"]


def config(folder: Path, max_steps: int) -> Config:
    return Config.model_validate(
        {
            "data": {"datasets": ["none"]},
            "optimization": {"epochs": 4, "ipe": 10},
            "train": {"out": str(folder), "device": "cpu", "max_steps": max_steps, "log_every": 5, "seed": 0},
        }
    )


def train(folder: Path, max_steps: int, resume: bool = False) -> Line:
    trainer = Trainer(config(folder, max_steps), resume=resume, make_task=Line)
    assert trainer.fit().exit_code == 0
    assert isinstance(trainer.task, Line)
    return trainer.task


def test_a_line_is_learned_logged_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(tmp_path / "whole", 40)
    assert abs(whole.model.weight.item() - 2) < 0.2 and abs(whole.model.bias.item() - 1) < 0.2
    assert whole.said == ["announced", "judged"]
    train(tmp_path / "parts", 17)
    resumed = train(tmp_path / "parts", 40, resume=True)
    assert resumed.said == ["at 17", "announced", "judged"]
    assert "points a step 8 -> 9" in capsys.readouterr().out
    assert torch.equal(resumed.model.weight, whole.model.weight)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    last = [json.loads(lines[-1]) for lines in logs]
    assert last[0]["slope"] == last[1]["slope"] == resumed.watched[-1]["slope"]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())[0]["what"] == "a line"
    assert (tmp_path / "whole" / "report.html").exists()
