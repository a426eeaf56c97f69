"""Tracks the health of a run: logs its statistics, warns, and summarises."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from vjepa_fast.common.atomic import disk_errors, write_text
from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA, JEPAOutput
from vjepa_fast.train.monitor.collapse import CollapseWatch
from vjepa_fast.train.monitor.health import health_figures, read_figures

WARNINGS = "warnings.jsonl"


class RunHealth:
    """Logs and judges the health of a run, on its first process.

    Args:
        cfg: with optimization.ipe set.
        folder: run folder; warnings are written to warnings.jsonl there.
        say: prints a warning.
    """

    def __init__(self, cfg: Config, folder: Path, say: Callable[[str], object]) -> None:
        self.path = folder / WARNINGS
        self._watch = CollapseWatch(cfg)
        self._exponent = cfg.loss.loss_exp
        self._say = say
        self.last: Mapping[str, float | None] = {}
        """The row looked at last."""
        self.num_warnings = 0
        """Given since the run began, over all restarts."""

    def rewind(self, jsonl_path: Path) -> None:
        """Be where the rows of metrics.jsonl end, and make the warnings those that they gave.

        Raises:
            UserError: the file cannot be written.
        """
        warnings = []
        for line in jsonl_path.read_text().splitlines():
            row = json.loads(line)
            # A run of an earlier version wrote fewer figures.
            if "context_std" in row:
                warnings += self._warnings(row)
        if warnings or self.path.exists():
            write_text(self.path, "".join(json.dumps(warning) + "\n" for warning in warnings))

    def figures(self, part_norms: Tensor, output: JEPAOutput, model: VJEPA) -> dict[str, float]:
        """Health statistics of a step, in one copy from the device; part_norms as in StepResult."""
        norms = dict(zip(("grad_norm_encoder", "grad_norm_predictor"), part_norms.unbind(), strict=True))
        return read_figures(norms | health_figures(output, model, self._exponent))

    def observe(self, row: Mapping[str, float | None]) -> None:
        """Warn if this row of metrics.jsonl is of a run that collapses.

        Raises:
            UserError: the warning cannot be written.
        """
        for warning in self._warnings(row):
            self._say(f"WARNING, step {warning['step']}: {warning['warning']}")
            with disk_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps(warning) + "\n")

    def _warnings(self, row: Mapping[str, float | None]) -> list[dict[str, object]]:
        self.last = row
        found = self._watch.observe(row)
        if found is None:
            return []
        self.num_warnings += 1
        step = int(row["step"] or 0) + 1
        return [{"step": step, "kind": found.kind, "cause": found.cause, "warning": found.text}]

    def summary(self) -> str:
        """One or two sentences for the end of a run; empty where nothing was measured."""
        last = self.last
        values = [last.get(name) for name in ("explained", "target_std", "target_rank")]
        if None in values or not values:
            return ""
        explained, std, rank = (value or 0.0 for value in values)
        text = (
            f"predictions explain {100 * explained:.0f} % of what differs in the targets (std {std:.2f}, effective "
            f"rank {rank:.0f})"
        )
        if self.num_warnings:
            text += f"; {self.num_warnings} warning{'s' if self.num_warnings > 1 else ''} in {self.path}"
        return text
