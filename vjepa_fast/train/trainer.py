"""The training loop of any task: batches, steps, logs, checkpoints, signals."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vjepa_fast import config as config_files
from vjepa_fast.checkpoints.run_folder import choose_folder, newest_checkpoint
from vjepa_fast.common.atomic import remove_leftovers, write_text
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed.processes import Processes, choose_device
from vjepa_fast.distributed.signals import StopSignals
from vjepa_fast.distributed.watchdog import Phase, Watchdog
from vjepa_fast.train.monitor.broken_videos_file import BrokenList
from vjepa_fast.train.monitor.pending_metrics import Pending, read_back
from vjepa_fast.train.monitor.progress import RunConsole
from vjepa_fast.train.monitor.recovery import Recovery
from vjepa_fast.train.monitor.run_log import RunLog, RunSummary
from vjepa_fast.train.pretraining import Pretraining
from vjepa_fast.train.report import run_json
from vjepa_fast.train.report.run_report import conclude
from vjepa_fast.train.run_checkpoints import RunCheckpoints
from vjepa_fast.train.speed.profiling import StepProfiler
from vjepa_fast.train.speed.step_timer import StepTimer
from vjepa_fast.train.task import RunContext, Samples, StepOutcome, Task

_CLOSED, _NO_CLIPS = 1, 2
"""What the processes agree on when the output was closed, or one of them cannot have clips."""


class Trainer:
    """Trains a task as configured.

    Args:
        cfg: what to do.
        resume: continue the run in the run folder.
        profile: also write a profile of a few steps into the run folder.
        folder: run folder; None: chosen from the config.
        stop: signal handlers that are installed already; None: `fit` installs its own.
        make_task: what is trained; V-JEPA pretraining.

    Raises:
        ConfigError, UserError: something is wrong with the configuration, the data or a checkpoint.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        resume: bool = False,
        profile: bool = False,
        folder: Path | None = None,
        stop: StopSignals | None = None,
        make_task: Callable[[RunContext], Task] = Pretraining,
    ) -> None:
        self.cfg = cfg = cfg.model_copy(deep=True)
        cfg.check_trainable()
        self.device = choose_device(cfg.train.device, int(os.environ.get("LOCAL_RANK", "0")))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.processes = Processes(self.device)
        self.console = RunConsole(quiet=not self.processes.is_first)
        self.stop = stop or StopSignals(verbose=self.processes.is_first)
        self.folder = folder or choose_folder(cfg, resume)
        profiled = profile and self.processes.is_first
        context = RunContext(cfg, self.folder, self.device, self.processes, self.console, profiled)
        self._say = context.say
        self.task = make_task(context)
        self.model, self.loader = self.task.model, self.task.loader
        self.checkpoints = RunCheckpoints(context, self.task)
        start = self.checkpoints.start(resume or cfg.train.auto_resume)
        self.step, self._recent_loss, self._saved_step = start.step, start.loss, start.saved_step
        self.writer = self.checkpoints.writer
        self.loader.load_state_dict({"step": self.step})
        self.total_steps = cfg.optimization.num_steps
        self.last_step = self.total_steps if cfg.train.max_steps is None else min(cfg.train.max_steps, self.total_steps)
        self.profiler = StepProfiler(self.folder, self.step + 5) if profiled else None
        self.broken_list = BrokenList(self.folder, self.processes.rank, self.step > 0)
        self.recovery = Recovery(cfg, self.folder, self.processes.rank, self.checkpoints.roll_back, self._say)
        self.watchdog = Watchdog(self.processes, cfg.train.watchdog)
        self._stop_code = 0
        self._no_clips: UserError | None = None
        self._save_asked = False

    def fit(self, finish: Callable[[Trainer], None] | None = None) -> RunSummary:
        """Train to the end, or until SIGINT or SIGTERM; both write a checkpoint first.

        Args:
            finish: called on all processes when the last step is done, before the report of the run is written; the
                command passes vjepa_fast.evaluation.demo.probe_run, which does what train.probe says.

        Raises:
            UserError: too many broken videos or decoding processes that keep dying, both after a checkpoint was
                written; a full disk, gradients that stay non-finite, or an output that nobody reads any more.
        """
        if self.processes.is_first:
            remove_leftovers(self.folder)
            self.writer.forget_after(self.step)
            write_text(self.folder / "config.yaml", config_files.dump(self.cfg))
            run_json.begin(self.folder, self.step, self.device.type, self.task.about())
        # The others write files too, whose temporary names must not be taken for leftovers.
        self.processes.wait()
        self.stop.install()
        self.task.announce()
        try:
            summary = self._fit()
            if finish is not None and summary.exit_code == 0:
                finish(self)
        except Exception as error:
            self._report(str(error) or type(error).__name__)
            raise
        self._report(summary.how)
        return summary

    def run_step(self, batch: Any) -> StepOutcome:
        """Train on one batch."""
        return self.task.run_step(batch)

    def save(self) -> None:
        """Write a checkpoint, and the one that stays for good where it is due; all processes call it."""
        self.watchdog.at(self.step, Phase.CHECKPOINT)
        self.broken_list.write(self.loader.broken())
        self.checkpoints.save(self.step, self._recent_loss, self._kept_for_good())
        self._saved_step = self.step
        self.watchdog.at(self.step, Phase.CHECKPOINT_DONE)
        self.processes.wait()

    def _fit(self) -> RunSummary:
        log = RunLog(self.folder, self.processes, self.console, self.step, self.last_step, self.cfg.train.tensorboard)
        try:
            if self.processes.is_first:
                self.task.rewind_health(log.files.jsonl_path)
            self._loop(log)
        finally:
            log.progress.close()
            self.watchdog.stop()
            self.writer.wait()
            if self.profiler is not None:
                self.profiler.close()
            self.loader.close()
            self.broken_list.write(self.loader.broken())
            log.close()
            self.stop.restore()
        code = 1 if self._stop_code == _NO_CLIPS else self._stop_code
        speed = log.speed
        summary = RunSummary(code, self.step, self._recent_loss, speed.clips_per_s, speed.data_wait, self.folder)
        self._summarise(summary)
        if self._stop_code == _NO_CLIPS and self._no_clips is not None:
            raise self._no_clips
        if self._stop_code == _CLOSED and self.processes.is_first:
            raise UserError(
                f"the output was closed (a broken pipe): stopped at step {self.step}, after a "
                "checkpoint was written; continue with --resume"
            )
        return summary

    def _loop(self, log: RunLog) -> None:
        pending: list[Pending] = []
        outcome: StepOutcome | None = None
        first, batches, timer = self.step, iter(self.loader), StepTimer(self.device)
        while self.step < self.last_step:
            timer.ask()
            self.watchdog.at(self.step, Phase.CLIPS)
            batch = self._take(batches)
            self.watchdog.at(self.step, Phase.OTHERS)
            # Agreed on before the step, so that no process waits in a collective for one that has stopped.
            if self._agree_to_stop():
                break
            assert batch is not None
            self.watchdog.at(self.step, Phase.STEP)
            timer.arrive()
            outcome = self.run_step(batch)
            # Without what the step computed, which would pile up until the next line of the log.
            pending.append(self._pending(batch, outcome, timer))
            self.step += 1
            log.progress.advance(self.step)
            if self.profiler is not None:
                self.profiler.after_step(self.step)
            self.watchdog.at(self.step, Phase.LOG)
            due = self._checkpoint_due()
            # The first one, which shows how the run begins.
            if due or self.step % self.cfg.train.log_every == 0 or self.step == 1:
                self._flush(pending, outcome, log)
                pending.clear()
            if due:
                self._save_unless_bad()
            self.watchdog.start()
        if pending:
            assert outcome is not None
            self._flush(pending, outcome, log)
        # A run that never got clips leaves nothing that would have to be resumed.
        if self._saved_step != self.step and not (self._stop_code == _NO_CLIPS and self.step == first):
            self.save()
        self.writer.wait()
        self._agree_to_stop()
        self.watchdog.stop()

    def _pending(self, batch: Samples, outcome: StepOutcome, timer: StepTimer) -> Pending:
        num_clips = batch.num_samples * self.processes.world_size
        return Pending(
            self.step,
            outcome.loss,
            outcome.grad_norm,
            outcome.skipped,
            outcome.schedule,
            num_clips,
            timer.end(),
            batch.sample_ids,
        )

    def _take(self, batches: Iterator[Any]) -> Any:
        """The next batch; None when the run has to stop."""
        try:
            return self.stop.waiting(lambda: next(batches))
        except UserError as error:
            # Raised when all processes have heard of it and a checkpoint is written.
            self._no_clips = error
            return None

    def _agree_to_stop(self) -> bool:
        code = self.stop.code or (_NO_CLIPS if self._no_clips else _CLOSED if self.console.closed else 0)
        save_asked = self.stop.save_asked
        agreed = self.processes.largest(code << 1 | save_asked)
        self._stop_code, self._save_asked = agreed >> 1, bool(agreed & 1)
        if save_asked:
            # Not what was asked for while the others were waited for: that is of the next step.
            self.stop.save_asked = False
        return self._stop_code != 0

    def _checkpoint_due(self) -> bool:
        every = self.cfg.train.checkpoint_every or self.cfg.optimization.ipe
        assert every is not None
        return self.step % every == 0 or self._save_asked or self._checkpoint_needed()

    def _checkpoint_needed(self) -> bool:
        return self.step == self.last_step or self._kept_for_good() is not None

    def _kept_for_good(self) -> Path | None:
        """e<epoch>.pt if one is due at this step; epochs are counted from 0, as in the reference."""
        assert self.cfg.optimization.ipe is not None
        finished, offset = divmod(self.step, self.cfg.optimization.ipe)
        freq = self.cfg.train.save_every_freq
        due = freq > 0 and finished > 0 and offset == 0 and (finished - 1) % freq == 0
        return self.folder / f"e{finished - 1}.pt" if due else None

    def _save_unless_bad(self) -> None:
        if self.recovery.delays_checkpoint(self._saved_step) and not self._checkpoint_needed():
            num_bad = self.recovery.bad_steps.in_a_row
            self._say(f"no checkpoint at step {self.step}: the last {num_bad} steps were bad")
        else:
            self.save()

    def _flush(self, pending: list[Pending], outcome: StepOutcome, log: RunLog) -> None:
        """Read the metrics of the pending steps back and write them down, with those of the last one's outcome."""
        ipe = self.cfg.optimization.ipe
        assert ipe is not None
        steps = read_back(pending, self.processes, ipe)
        self._recent_loss = steps.mean_loss
        first = self.processes.is_first
        row = log.write(self.step, pending, steps, self.task.metrics(outcome) if first else {})
        if first:
            self.task.watch(row)
        self.recovery.observe(self.step, pending, steps, self._saved_step)

    def _report(self, how: str) -> None:
        if self.processes.is_first:
            conclude(self.folder, self.step, how, self._say)

    def _summarise(self, summary: RunSummary) -> None:
        newest = newest_checkpoint(self.folder) if self._saved_step is not None else None
        summary.tell(self.console, self.total_steps, newest)
        if self.processes.is_first:
            self.task.verdict()
        broken = [video for video in self.loader.broken() if not video.filtered]
        if broken:
            self._say(
                f"{len(broken)} of {self.loader.num_tried} videos could not be read and were replaced: "
                f"{self.broken_list.path}"
            )
        if summary.exit_code:
            self._say("continue with --resume")
