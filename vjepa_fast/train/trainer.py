"""The training loop: data, masks, steps, metrics, checkpoints, signals."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vjepa_fast import config as config_files
from vjepa_fast.checkpoints.run_folder import choose_folder, newest_checkpoint
from vjepa_fast.common.atomic import remove_leftovers, write_text
from vjepa_fast.common.cache_dir import default_cache_dir
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.common.rng import Stream, pack_tag, random_words
from vjepa_fast.config.schema import Config
from vjepa_fast.data.decode import dali
from vjepa_fast.data.decode.choose_backend import choose
from vjepa_fast.data.generated.registry import GENERATED, SYNTHETIC
from vjepa_fast.data.generated.synthetic import SyntheticSet
from vjepa_fast.data.loader import Batch, Loader, build_loader
from vjepa_fast.distributed.parallel import data_parallel, is_sharded, optimizer_of, shard, whole_copy
from vjepa_fast.distributed.processes import Processes, choose_device
from vjepa_fast.distributed.signals import StopSignals
from vjepa_fast.distributed.watchdog import Phase, Watchdog
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.masking.sampler import StepMasks
from vjepa_fast.models.compiled_blocks import require_compiler
from vjepa_fast.models.jepa import VJEPA, JEPAOutput
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.optim.outliers import MAX_OUTLIERS
from vjepa_fast.train.images_with_videos import JointLoader, JointMasks, add_image_masks, add_images
from vjepa_fast.train.monitor.bad_steps import BadSteps
from vjepa_fast.train.monitor.broken_videos_file import BrokenList
from vjepa_fast.train.monitor.metrics import MetricsLog
from vjepa_fast.train.monitor.out_of_memory import explain, ran_out
from vjepa_fast.train.monitor.pending_metrics import Pending, read_back
from vjepa_fast.train.monitor.progress import ProgressReport, RunConsole, Speed
from vjepa_fast.train.monitor.run_health import RunHealth
from vjepa_fast.train.monitor.summary import RunSummary
from vjepa_fast.train.report import run_json
from vjepa_fast.train.report.run_report import conclude
from vjepa_fast.train.run_checkpoints import RunCheckpoints, Surroundings
from vjepa_fast.train.speed.profiling import StepProfiler
from vjepa_fast.train.speed.speedups import SpeedUps, StepCallable, Trial
from vjepa_fast.train.speed.step_timer import StepTimer
from vjepa_fast.train.step import StepResult, TrainStep

MAX_SKIPPED = 50
"""Steps in a row with non-finite gradients after which a run gives up."""

NUM_EXPECTED = 256
"""Steps whose masks tell for which sizes CUDA graphs are captured."""

_CLOSED, _NO_CLIPS = 1, 2
"""What the processes agree on when nobody reads the output any more, or one of them cannot have clips."""


class Trainer:
    """Pretrains a model as configured.

    Args:
        cfg: what to do.
        resume: continue the run in the run folder.
        profile: also write a profile of a few steps into the run folder.
        folder: run folder; None: chosen from the config.
        stop: signal handlers that are installed already; None: `fit` installs its own.

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
        self.batch_size = cfg.data.per_process(self.processes.world_size)
        self.global_batch = self.batch_size * self.processes.world_size
        self.backend = choose(cfg.data.backend, self.device)
        self._make_clips()
        videos = self._build_loader()
        self.loader: Loader | JointLoader = videos
        if cfg.img_data is not None:
            self.loader = add_images(videos, cfg, self.processes.rank, self.processes.world_size, self.device)
        if cfg.optimization.ipe is None:
            cfg.optimization.ipe = max(1, self.loader.clips_per_epoch // self.global_batch)
        torch.manual_seed(cfg.train.seed)
        if cfg.model.compile_model is True:
            require_compiler(self.device)
        self.model = VJEPA.from_config(cfg)
        sharded = cfg.train.parallel == "fsdp" and self.processes.distributed
        if sharded:
            shard(self.model, self.device, cfg.train.grad_dtype)
        self.model.to(self.device)
        masks = StepMasks(
            cfg.mask,
            fpcs=videos.fpcs,
            crop_size=cfg.data.crop_size,
            patch_size=cfg.data.patch_size,
            tubelet_size=cfg.data.tubelet_size,
            seed=cfg.train.seed,
            global_batch=self.global_batch,
            group_of=videos.group_of,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            sum_over_processes=self.processes.sum_on_host,
        )
        self.masks: StepMasks | JointMasks = masks
        if cfg.img_data is not None:
            self.masks = add_image_masks(masks, cfg, self.processes.rank, self.processes.world_size)
        whole = self.processes.distributed and not sharded
        self.train_step = TrainStep(
            self.model,
            cfg,
            data_parallel(self.model, cfg, len(videos.fpcs)) if whole else None,
            self.processes.world_size,
            optimizer_of(self.model, cfg, len(videos.fpcs)) if whole else AdamWEMA,
        )
        self.speed_ups = SpeedUps(cfg, self.train_step, self.processes, self._say)
        self._run: StepCallable | None = None
        surroundings = Surroundings(self.batch_size, self.global_batch, self._global_images, self.backend)
        self.checkpoints = RunCheckpoints(
            cfg, self.folder, self.train_step, self.masks, surroundings, self.processes, self.console
        )
        start = self.checkpoints.start(resume or cfg.train.auto_resume)
        self.step, self._recent_loss, self._saved_step = start.step, start.loss, start.saved_step
        self.writer = self.checkpoints.writer
        self.loader.load_state_dict({"step": self.step})
        self.total_steps = cfg.optimization.num_steps
        self.last_step = self.total_steps if cfg.train.max_steps is None else min(cfg.train.max_steps, self.total_steps)
        self.profiler = StepProfiler(self.folder, self.step + 5) if profile and self.processes.is_first else None
        self.broken_list = BrokenList(self.folder, self.processes.rank, self.step > 0)
        self._stop_code = 0
        self._no_clips: UserError | None = None
        self._save_asked = False
        self.bad_steps = BadSteps(self.folder, self.processes.rank, cfg.train.spike_factor)
        self._num_rollbacks = 0
        self.health = RunHealth(cfg, self.folder, partial(self._say, style="bold yellow"))
        self.watchdog = Watchdog(self.processes, cfg.train.watchdog)
        self._num_outliers = 0

    def fit(self) -> RunSummary:
        """Train to the end, or until SIGINT or SIGTERM; both write a checkpoint first.

        Raises:
            UserError: too many broken videos or decoding processes that keep dying, both after a checkpoint was
                written; a full disk, gradients that stay non-finite, or an output that nobody reads any more.
        """
        if self.processes.is_first:
            remove_leftovers(self.folder)
            self.writer.forget_after(self.step)
            write_text(self.folder / "config.yaml", config_files.dump(self.cfg))
            run_json.begin(self.folder, self.step, self.device.type, self._about())
        # The others write files too, whose temporary names must not be taken for leftovers.
        self.processes.wait()
        self.stop.install()
        self._announce()
        try:
            summary = self._fit()
        except Exception as error:
            self._report(str(error) or type(error).__name__)
            raise
        self._report(summary.how)
        return summary

    def _fit(self) -> RunSummary:
        log = MetricsLog(self.folder, self.processes.rank, self.step, self.cfg.train.tensorboard)
        if self.processes.is_first:
            self.health.rewind(log.jsonl_path)
        progress = ProgressReport(self.last_step, self.step, self.console, self.processes.is_first)
        speed = Speed()
        try:
            self._loop(log, progress, speed)
        finally:
            progress.close()
            self.watchdog.stop()
            self.writer.wait()
            if self.profiler is not None:
                self.profiler.close()
            self.loader.close()
            self.broken_list.write(self.loader.broken())
            log.close()
            self.stop.restore()
        code = 1 if self._stop_code == _NO_CLIPS else self._stop_code
        summary = RunSummary(code, self.step, self._recent_loss, speed.clips_per_s, speed.data_wait, self.folder)
        self._summarise(summary)
        if self._stop_code == _NO_CLIPS and self._no_clips is not None:
            raise self._no_clips
        if self._stop_code == _CLOSED and self.processes.is_first:
            raise UserError(
                f"nobody reads the output any more (a closed pipe): stopped at step {self.step}, after a "
                "checkpoint was written; continue with --resume"
            )
        return summary

    def _loop(self, log: MetricsLog, progress: ProgressReport, speed: Speed) -> None:
        every = self.cfg.train.checkpoint_every or self.cfg.optimization.ipe
        assert every is not None
        pending: list[Pending] = []
        output: JEPAOutput | None = None
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
            result = self.run_step(batch)
            times = timer.end()
            num_clips = sum(len(clips) for clips in batch.clips) * self.processes.world_size
            # Without the features and predictions, which would pile up until the next line of the log.
            pending.append(
                Pending(
                    self.step,
                    result.loss,
                    result.grad_norm,
                    result.part_norms,
                    result.skipped,
                    {"lr": result.lr, "weight_decay": result.weight_decay, "momentum": result.momentum},
                    num_clips,
                    times,
                    batch.sample_ids,
                )
            )
            output = result.output
            self.step += 1
            progress.advance(self.step)
            if self.profiler is not None:
                self.profiler.after_step(self.step)
            due = (
                self.step % every == 0
                or self.step == self.last_step
                or self._kept_for_good() is not None
                or self._save_asked
            )
            self.watchdog.at(self.step, Phase.LOG)
            # The first one, which shows how the run begins.
            if due or self.step % self.cfg.train.log_every == 0 or self.step == 1:
                self._flush(pending, output, log, progress, speed)
                pending.clear()
            if due and self._may_be_bad():
                self._say(f"no checkpoint at step {self.step}: the last {self.bad_steps.in_a_row} steps were bad")
            elif due:
                self.save()
            self.watchdog.start()
        if pending:
            self._flush(pending, output, log, progress, speed)
        # A run that never got clips leaves nothing that would have to be resumed.
        if self._saved_step != self.step and not (self._stop_code == _NO_CLIPS and self.step == first):
            self.save()
        self.writer.wait()
        self._agree_to_stop()
        self.watchdog.stop()

    def _take(self, batches: Iterator[Batch]) -> Batch | None:
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

    def run_step(self, batch: Batch) -> StepResult:
        """Train on one batch: masks, forward, backward, update."""
        masks = self._masks_of(batch)
        # Drop path and noised targets draw from torch's generator; this makes a resumed run draw the same.
        words = random_words(self.cfg.train.seed, self.processes.rank, batch.step, pack_tag(Stream.DROP_PATH))
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        if self._run is None:
            self._run = self._choose_step(batch, masks)
        try:
            return self._run(batch.step, batch.clips, masks)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise UserError(
                explain(self.cfg, self.batch_size, self.device, batch.step, self.processes.world_size)
            ) from error

    def _choose_step(self, batch: Batch, masks: list[MaskBatch]) -> StepCallable:
        """Compiled blocks and CUDA graphs, as configured or as measured on this batch; training is as it would be."""
        one_length = len(self.loader.fpcs) == 1 and self.masks.reference is None
        trials: list[Trial] = []
        if self.speed_ups.measures:
            # Masks of the next steps too, where they can be had without a trace: token counts differ.
            trials.append(Trial(batch.step, batch.clips, masks))
            for step in range(batch.step + 1, batch.step + 4) if one_length else ():
                ids = [group + (step - batch.step) * self.global_batch for group in batch.sample_ids]
                trials.append(Trial(step, batch.clips, self.masks(step, ids, batch.group_ids, self.device)))
        sizes: list[Sizes] = []
        if one_length and self.speed_ups.graphs_can_serve:
            # Of the run's first steps, wherever it goes on, so that it has the same buckets after a restart.
            for step in range(NUM_EXPECTED):
                ids = [torch.arange(step * self.batch_size, (step + 1) * self.batch_size)]
                sizes += map(Sizes.of, self.masks(step, ids, [0]))
        return self.speed_ups.choose(trials, sizes, len(self.loader.fpcs), self.profiler is not None)

    def _say(self, sentence: str, style: str | None = None) -> None:
        self.console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)

    def _masks_of(self, batch: Batch) -> list[MaskBatch]:
        return self.masks(batch.step, batch.sample_ids, batch.group_ids, self.device)

    def save(self) -> None:
        """Write a checkpoint, and the one that stays for good where it is due; all processes call it."""
        self.watchdog.at(self.step, Phase.CHECKPOINT)
        self.broken_list.write(self.loader.broken())
        self.checkpoints.save(self.step, self._recent_loss, self._kept_for_good())
        self._saved_step = self.step
        self.watchdog.at(self.step, Phase.CHECKPOINT_DONE)
        self.processes.wait()

    def _kept_for_good(self) -> Path | None:
        """e<epoch>.pt if one is due at this step; epochs are counted from 0, as in the reference."""
        assert self.cfg.optimization.ipe is not None
        finished, offset = divmod(self.step, self.cfg.optimization.ipe)
        freq = self.cfg.train.save_every_freq
        due = freq > 0 and finished > 0 and offset == 0 and (finished - 1) % freq == 0
        return self.folder / f"e{finished - 1}.pt" if due else None

    def _flush(
        self, pending: list[Pending], output: JEPAOutput | None, log: MetricsLog, progress: ProgressReport, speed: Speed
    ) -> None:
        """Read the figures of the pending steps back and write them down, with the health of the last one's output."""
        ipe = self.cfg.optimization.ipe
        assert ipe is not None
        figures = read_back(pending, self.processes, ipe)
        for p, (wait, seconds) in zip(pending, figures.times, strict=True):
            speed.add(p.num_clips, wait + seconds, wait)
        assert output is not None
        first = self.processes.is_first
        health = self.health.figures(pending[-1].part_norms, output, self.model) if first else {}
        row = log.write(figures.rows, health)
        took = sum(map(sum, figures.times))
        self._recent_loss = figures.mean_loss
        progress.report(
            self.step,
            loss=self._recent_loss,
            lr=pending[-1].schedule["lr"],
            clips_per_s=sum(p.num_clips for p in pending) / took,
            data_wait=sum(wait for wait, _ in figures.times) / took,
            explained=health.get("explained"),
        )
        if first:
            self.health.look(row)
        for p, loss, norm, skip in zip(pending, figures.losses, figures.norms, figures.skipped, strict=True):
            self.bad_steps.look(p.step, loss, norm, bool(skip) and not math.isfinite(norm), p.sample_ids)
            # Its gradients were finite, so that its loss was an outlier.
            self._num_outliers += bool(skip) and math.isfinite(norm)
        if self._num_outliers > MAX_OUTLIERS:
            raise UserError(
                f"{self._num_outliers} steps up to step {self.step} were skipped because of their loss, more than "
                f"{self.cfg.optimization.loss_reg_std_mult:g} standard deviations above the mean of the last ones; "
                f"checkpoints are in {self.folder}. Try a smaller optimization.lr, or a larger "
                "optimization.loss_reg_std_mult"
            )
        num_bad = self.bad_steps.in_a_row
        if num_bad >= self.cfg.train.rollback_after and self._can_roll_back:
            self._roll_back()
        elif num_bad >= MAX_SKIPPED:
            again = f", after going back {self._num_rollbacks} times" if self._num_rollbacks else ""
            raise UserError(
                f"the gradients were not finite in {num_bad} steps in a row, up to step {self.step}{again}; "
                f"checkpoints are in {self.folder}, the steps and their clips in {self.bad_steps.path}. Try a smaller "
                "optimization.lr, or train.dtype=bfloat16 in place of float16"
            )

    @property
    def _can_roll_back(self) -> bool:
        return self._saved_step is not None and self._num_rollbacks < self.cfg.train.max_rollbacks

    def _may_be_bad(self) -> bool:
        """Whether a checkpoint that is due had better wait: who goes back needs one from before the bad steps."""
        needed = self.step == self.last_step or self._kept_for_good() is not None
        return self.bad_steps.in_a_row > 0 and self._can_roll_back and not needed

    def _roll_back(self) -> None:
        """Weights, optimizer and target encoder of the last checkpoint; data and schedules go on where they are."""
        self.checkpoints.roll_back()
        self._num_rollbacks += 1
        self._say(
            f"the last {self.bad_steps.in_a_row} steps up to step {self.step} were bad ({self.bad_steps.path}): "
            f"back to the weights of step {self._saved_step}, on with the data that comes next; this is time "
            f"{self._num_rollbacks} of at most {self.cfg.train.max_rollbacks}"
        )
        self.bad_steps.in_a_row = 0

    @property
    def _global_images(self) -> int:
        return 0 if self.cfg.img_data is None else self.cfg.img_data.per_process * self.processes.world_size

    def _build_loader(self) -> Loader:
        names = [str(self.manifests[name]) if name in self.manifests else name for name in self.cfg.data.datasets]
        data = self.cfg.data.model_copy(update={"datasets": names})
        return build_loader(data, self.processes.rank, self.processes.world_size, self.device)

    def _make_clips(self) -> None:
        """The sets that names in data.datasets stand for."""
        names = self.cfg.data.datasets
        if SYNTHETIC not in names:
            if self.cfg.train.probe is True:
                raise ConfigError(
                    f"train.probe needs the labels of the clips that {SYNTHETIC!r} stands for; "
                    "set train.probe=false for other data"
                )
            self.cfg.train.probe = False
        cache = self.cfg.data.cache_dir or default_cache_dir()
        wanted = {name: GENERATED[name] for name in dict.fromkeys(names) if name in GENERATED}
        for kind in wanted.values():
            self._say(f"{kind.folder} videos in {cache / kind.folder}")
            if self.processes.is_first:
                kind.make(cache / kind.folder)
        if wanted:
            self.processes.wait()
        self.manifests = {name: kind.make(cache / kind.folder) for name, kind in wanted.items()}
        if SYNTHETIC in wanted:
            csv = self.manifests[SYNTHETIC]
            self.synthetic = SyntheticSet(csv, csv.with_name("val.csv"))

    def _about(self) -> dict[str, Any]:
        """For the record of the run."""
        names = self.cfg.data.datasets
        return {
            "encoder_parameters": _num_parameters(self.model.encoder),
            "predictor_parameters": _num_parameters(self.model.predictor),
            "videos": self.loader.num_videos,
            "manifests": [
                name if "://" in name else str(Path(self.manifests.get(name, name)).absolute()) for name in names
            ],
            "held_out": str(self.manifests[names[0]].with_name("val.csv")) if names[0] in self.manifests else None,
            "clips_a_step": self.global_batch,
            "images_a_step": self._global_images,
            "processes": self.processes.world_size,
        }

    def _report(self, how: str) -> None:
        if self.processes.is_first:
            conclude(self.folder, self.step, how, self._say)

    def _announce(self) -> None:
        cfg = self.cfg
        counts = [_num_parameters(network) / 1e6 for network in (self.model.encoder, self.model.predictor)]
        tokens = " + ".join(str(t * h * w) for t, h, w in self.masks.grids)
        and_images, images = "", ""
        if cfg.img_data is not None:
            and_images, images = " and images", f" and {self._global_images} images"
        many = f", {self.processes.world_size} processes" if self.processes.distributed else ""
        self.console.print(
            f"{cfg.model.model_name}: encoder {counts[0]:.1f} M, predictor {counts[1]:.1f} M parameters, "
            f"{tokens} tokens a clip\n{self.loader.num_videos} videos{and_images}, {self.global_batch} clips{images} "
            f"a step, {self.device.type}{many}, {cfg.train.dtype}\n"
            f"run folder {self.folder}",
            highlight=False,
            soft_wrap=True,
        )
        if self.device.type == "cuda" and cfg.data.backend == "auto" and self.backend == "pyav":
            self._say(f"PyAV decodes, on the CPU: {dali.missing(self.device)}")
        if cfg.model.compile_model is True:
            self.console.print(
                "model.compile_model is set: the first step compiles, which may take a minute or two",
                highlight=False,
                soft_wrap=True,
            )
        if self.speed_ups.measures:
            self._say("what is set to auto is measured before the first step, which may take a minute or two")

    def _summarise(self, summary: RunSummary) -> None:
        newest = newest_checkpoint(self.folder) if self._saved_step is not None else None
        summary.tell(self.console, self.total_steps, newest)
        if self.processes.is_first and (health := self.health.summary()):
            self._say(health, "bold yellow" if self.health.num_warnings else None)
        broken = [video for video in self.loader.broken() if not video.filtered]
        if broken:
            self.console.print(
                f"{len(broken)} of {self.loader.num_tried} videos could not be read and were replaced: "
                f"{self.broken_list.path}",
                highlight=False,
                soft_wrap=True,
            )
        if summary.exit_code:
            self.console.print("continue with --resume", highlight=False)
            return
        if not self.cfg.train.probe:
            return
        model = whole_copy(self.model) if is_sharded(self.model) else self.model
        if self.processes.is_first and model is not None:
            from vjepa_fast.evaluation.demo import probe_table

            probe_table(self.cfg, model.to(self.device), self.synthetic, self.folder, self.console)


def _num_parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
