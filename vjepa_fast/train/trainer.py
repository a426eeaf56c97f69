"""The training loop: data, masks, steps, metrics, checkpoints, signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import vjepa_fast
from vjepa_fast import config as config_files
from vjepa_fast.config.schema import Config
from vjepa_fast.data.decode.index import default_cache_dir
from vjepa_fast.data.loader import Batch, Loader, build_loader
from vjepa_fast.data.synthetic import make_synthetic
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.interop import meta
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import StepMasks
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.rng import Stream, pack_tag, random_words
from vjepa_fast.train.checkpoint import remove_leftovers, write_atomically
from vjepa_fast.train.distributed import Processes, choose_device, launch
from vjepa_fast.train.health import effective_rank, feature_std
from vjepa_fast.train.metrics import MetricsLog, plot_loss
from vjepa_fast.train.profiling import StepProfiler
from vjepa_fast.train.progress import ProgressReport
from vjepa_fast.train.run_folder import LATEST, choose_folder
from vjepa_fast.train.step import StepResult, TrainStep

MAX_SKIPPED = 50
"""Steps in a row with non-finite gradients after which a run gives up."""

SYNTHETIC = "synthetic:"
SYNTHETIC_SIZE = (400, 200)
"""Training and held-out videos that `synthetic:` stands for."""


@dataclass
class RunSummary:
    """How a run ended."""

    exit_code: int
    """0 finished, 130 interrupted, 143 ended by SIGTERM; the last two after a checkpoint was written."""
    step: int
    """Steps done, over all restarts."""
    loss: float
    """Mean of the last steps logged; nan if this process did none."""
    clips_per_s: float
    """Over all processes, after the first steps."""
    folder: Path


@dataclass
class _Pending:
    """A step whose figures are still on the device."""

    step: int
    result: StepResult
    num_clips: int
    iter_s: float
    step_s: float
    data_s: float


class Trainer:
    """Pretrains a model as configured.

    Args:
        cfg: what to do.
        resume: continue the run in the run folder.
        profile: also write a profile of a few steps into the run folder.
        folder: run folder; None: chosen from the config.

    Raises:
        ConfigError, UserError: something is wrong with the configuration, the data or a checkpoint.
    """

    def __init__(self, cfg: Config, *, resume: bool = False, profile: bool = False, folder: Path | None = None) -> None:
        self.cfg = cfg = cfg.model_copy(deep=True)
        cfg.check_trainable()
        self.device = choose_device(cfg.train.device, int(os.environ.get("LOCAL_RANK", "0")))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.processes = Processes(self.device)
        self.console = Console(quiet=not self.processes.is_first)
        self.folder = folder or choose_folder(cfg, resume)
        self.batch_size = cfg.data.per_process(self.processes.world_size)
        self.global_batch = self.batch_size * self.processes.world_size
        self._make_synthetic()
        self.loader = self._build_loader()
        if cfg.optimization.ipe is None:
            cfg.optimization.ipe = max(1, self.loader.num_videos // self.global_batch)
        torch.manual_seed(cfg.train.seed)
        self.model = VJEPA(cfg.model).to(self.device)
        self.masks = StepMasks(
            cfg.mask, fpcs=self.loader.fpcs, crop_size=cfg.data.crop_size, patch_size=cfg.data.patch_size,
            tubelet_size=cfg.data.tubelet_size, seed=cfg.train.seed, global_batch=self.global_batch,
            group_of=self.loader.group_of, rank=self.processes.rank, world_size=self.processes.world_size,
            sum_over_processes=self.processes.sum_on_host,
        )
        self.train_step = TrainStep(self.model, cfg, self._data_parallel(), self.processes.world_size)
        self.step = 0
        self._start(resume or cfg.train.auto_resume)
        self.loader.load_state_dict({"step": self.step})
        self.total_steps = cfg.optimization.num_steps
        self.last_step = self.total_steps if cfg.train.max_steps is None else min(cfg.train.max_steps, self.total_steps)
        self.profiler = StepProfiler(self.folder, self.step + 5) if profile and self.processes.is_first else None
        self._stop_code = 0
        self._recent_loss = float("nan")
        self._num_skipped = 0

    def fit(self) -> RunSummary:
        """Train to the end, or until SIGINT or SIGTERM; both write a checkpoint first.

        Raises:
            UserError: too many broken videos, a full disk, or gradients that stay non-finite.
        """
        cfg = self.cfg
        if self.processes.is_first:
            (self.folder / "config.yaml").write_text(config_files.dump(cfg))
            remove_leftovers(self.folder)
        self._announce()
        log = MetricsLog(self.folder, self.processes.rank, self.step, cfg.train.tensorboard)
        progress = ProgressReport(self.last_step, self.step, self.console, self.processes.is_first)
        speed = _Speed(self.step)
        try:
            with self._signals():
                self._loop(log, progress, speed)
        finally:
            progress.close()
            log.close()
            self.loader.close()
        self._write_broken()
        if self.processes.is_first:
            plot_loss(log.csv_path, log.jsonl_path, self.folder / "loss.png")
        summary = RunSummary(self._stop_code, self.step, self._recent_loss, speed.clips_per_s, self.folder)
        self._summarise(summary)
        return summary

    def _loop(self, log: MetricsLog, progress: ProgressReport, speed: _Speed) -> None:
        every = self.cfg.train.checkpoint_every or self.cfg.optimization.ipe
        assert every is not None
        pending: list[_Pending] = []
        batches = iter(self.loader)
        while self.step < self.last_step and not self._stop_code:
            began = time.perf_counter()
            batch = next(batches)
            arrived = time.perf_counter()
            result = self.run_step(batch)
            ended = time.perf_counter()
            num_clips = sum(len(clips) for clips in batch.clips) * self.processes.world_size
            pending.append(_Pending(self.step, result, num_clips, ended - began, ended - arrived, arrived - began))
            speed.add(num_clips, ended - began)
            self.step += 1
            progress.advance(self.step)
            if self.profiler is not None:
                self.profiler.after_step(self.step)
            self._stop_code = self.processes.largest(self._stop_code)
            last = self.step == self.last_step or self._stop_code != 0
            due = self.step % every == 0 or last
            if due or self.step % self.cfg.train.log_every == 0:
                self._flush(pending, log, progress)
                pending.clear()
            if due:
                self.save()

    def run_step(self, batch: Batch) -> StepResult:
        """Train on one batch: masks, forward, backward, update."""
        masks = [mask.to(self.device, non_blocking=True) for mask in self._masks_of(batch)]
        # Drop path is the only thing that draws from torch's generator; this makes a resumed run draw the same.
        words = random_words(self.cfg.train.seed, self.processes.rank, batch.step, pack_tag(Stream.DROP_PATH))
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        return self.train_step(batch.step, batch.clips, masks)

    def _masks_of(self, batch: Batch) -> list[MaskBatch]:
        return self.masks(batch.step, batch.sample_ids, batch.group_ids)

    def save(self) -> None:
        """Write latest.pt, and e<epoch>.pt where one is due; only the first process writes."""
        cfg, steps_per_epoch = self.cfg, self.cfg.optimization.ipe
        assert steps_per_epoch is not None
        self._write_broken()
        if self.processes.is_first:
            # With masks from the reference's stream every process has a state; this one's is kept.
            contents = meta.to_checkpoint(
                self.model, self.train_step.optimizer, epoch=self.step // steps_per_epoch, loss=self._recent_loss,
                batch_size=self.batch_size, world_size=self.processes.world_size, lr=cfg.optimization.lr,
                scaler=self.train_step.scaler,
                extra={
                    "version": vjepa_fast.__version__, "step": self.step, "global_batch": self.global_batch,
                    "masks": self.masks.state_dict(), "config": cfg.model_dump(mode="json"),
                },
            )
            write_atomically(self.folder / LATEST, contents)
            epoch, offset = divmod(self.step, steps_per_epoch)
            if cfg.train.save_every_freq > 0 and offset == 0 and (epoch - 1) % cfg.train.save_every_freq == 0:
                write_atomically(self.folder / f"e{epoch - 1}.pt", contents)
        self.processes.wait()

    def _start(self, resume: bool) -> None:
        """Weights, optimizer and position from a checkpoint, if the config or the folder names one."""
        cfg = self.cfg
        latest = self.folder / LATEST
        if resume and latest.exists():
            path = latest
        elif cfg.train.read_checkpoint is not None:
            path = cfg.train.read_checkpoint
        elif cfg.optimization.anneal_ckpt is not None:
            path = cfg.optimization.anneal_ckpt
        else:
            if resume and not cfg.train.auto_resume:
                self.console.print(f"nothing to resume in {self.folder}: starting from the beginning", highlight=False)
            return
        info = meta.load_checkpoint(path, self.model, self.train_step.optimizer, self.train_step.scaler)
        if path == cfg.optimization.anneal_ckpt and path != latest:
            self.console.print(f"starting from the weights of {path}", highlight=False, soft_wrap=True)
            return
        own = info.get("vjepa_fast", {})
        assert cfg.optimization.ipe is not None
        self.step = int(own.get("step", int(info["epoch"]) * cfg.optimization.ipe))
        if own:
            self.masks.load_state_dict(own["masks"])
            if own["global_batch"] != self.global_batch:
                self.console.print(
                    f"the checkpoint was written with {own['global_batch']} clips a step, this run has "
                    f"{self.global_batch}: clips are counted anew from this step", highlight=False, soft_wrap=True)
        else:
            for _ in range(self.step):
                if self.masks.reference is not None:
                    self.masks.reference.step()
        self.console.print(f"continuing {path} at step {self.step}", highlight=False, soft_wrap=True)

    def _flush(self, pending: list[_Pending], log: MetricsLog, progress: ProgressReport) -> None:
        """Read the figures of the pending steps back and write them down."""
        shares = torch.stack([p.result.loss for p in pending]).double().cpu()
        losses = (self.processes.sum_on_host(shares) / self.processes.world_size).tolist()
        norms = torch.stack([p.result.grad_norm for p in pending]).tolist()
        skipped = torch.stack([p.result.skipped for p in pending]).tolist()
        ipe = self.cfg.optimization.ipe
        assert ipe is not None
        rows = [
            {
                "epoch": p.step // ipe + 1, "itr": p.step % ipe, "loss": loss, "iter-time(ms)": 1e3 * p.iter_s,
                "gpu-time(ms)": 1e3 * p.step_s, "dataload-time(ms)": 1e3 * p.data_s, "step": p.step, "lr": p.result.lr,
                "weight_decay": p.result.weight_decay, "momentum": p.result.momentum, "grad_norm": norm,
                "skipped": int(skip), "clips_per_s": p.num_clips / p.iter_s,
            }
            for p, loss, norm, skip in zip(pending, losses, norms, skipped, strict=True)
        ]
        log.write(rows, _health(pending[-1].result) if self.processes.is_first else None)
        seconds = sum(p.iter_s for p in pending)
        finite = [loss for loss, skip in zip(losses, skipped, strict=True) if not skip] or losses
        self._recent_loss = sum(finite) / len(finite)
        progress.report(
            self.step, loss=self._recent_loss, lr=pending[-1].result.lr,
            clips_per_s=sum(p.num_clips for p in pending) / seconds, data_wait=sum(p.data_s for p in pending) / seconds)
        for skip in skipped:
            self._num_skipped = self._num_skipped + 1 if skip else 0
        if self._num_skipped >= MAX_SKIPPED:
            raise UserError(
                f"the gradients were not finite in {self._num_skipped} steps in a row, up to step {self.step}; the "
                f"last checkpoint is in {self.folder}. Try a smaller optimization.lr, or train.dtype=bfloat16 in place "
                "of float16")

    def _build_loader(self) -> Loader:
        return build_loader(self.cfg.data, self.processes.rank, self.processes.world_size, self.device)

    def _data_parallel(self) -> DistributedDataParallel | None:
        if not self.processes.distributed:
            return None
        # Tokens that no frames-per-clip group uses never get a gradient; data parallelism must not wait for one.
        unused = range(len(self.loader.fpcs), len(self.model.predictor.mask_tokens))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.model, [f"predictor.mask_tokens.{index}" for index in unused])
        return DistributedDataParallel(
            self.model, broadcast_buffers=False, gradient_as_bucket_view=True,
            find_unused_parameters=len(self.loader.fpcs) > 1,
        )

    def _make_synthetic(self) -> None:
        if SYNTHETIC not in self.cfg.data.datasets:
            if self.cfg.train.probe:
                raise ConfigError(f"train.probe needs the labels of the clips that {SYNTHETIC!r} stands for; "
                                  "set train.probe=false for other data")
            return
        folder = (self.cfg.data.cache_dir or default_cache_dir()) / "demo"
        if self.processes.is_first:
            self.console.print(f"demo videos in {folder}", highlight=False, soft_wrap=True)
            make_synthetic(folder, *SYNTHETIC_SIZE)
        self.processes.wait()
        self.synthetic = make_synthetic(folder, *SYNTHETIC_SIZE)
        self.cfg.data.datasets = [
            str(self.synthetic.train_csv) if name == SYNTHETIC else name for name in self.cfg.data.datasets]

    def _write_broken(self) -> None:
        broken = self.loader.broken()
        if broken:
            lines = [f"{video.dataset}\t{video.path}\t{video.reason}\n" for video in broken]
            (self.folder / f"broken_r{self.processes.rank}.tsv").write_text("dataset\tpath\treason\n" + "".join(lines))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First SIGINT or SIGTERM: finish the step, write a checkpoint, leave. Second SIGINT: leave at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._stop_code:
                raise KeyboardInterrupt
            self._stop_code = 130 if number == signal.SIGINT else 143
            if number == signal.SIGINT:
                self.console.print("\nfinishing this step and writing a checkpoint (Ctrl-C again: leave at once)")

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            # Only the main thread may install handlers; a trainer in another thread is stopped by its owner.
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _announce(self) -> None:
        cfg = self.cfg
        counts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (self.model.encoder, self.model.predictor)]
        tokens = " + ".join(str(t * h * w) for t, h, w in self.masks.grids)
        many = f", {self.processes.world_size} processes" if self.processes.distributed else ""
        self.console.print(
            f"{cfg.model.model_name}: encoder {counts[0]:.1f} M, predictor {counts[1]:.1f} M parameters, "
            f"{tokens} tokens a clip\n{self.loader.num_videos} videos, {self.global_batch} clips a step, "
            f"{self.device.type}{many}, {cfg.train.dtype}\n"
            f"run folder {self.folder}", highlight=False, soft_wrap=True)

    def _summarise(self, summary: RunSummary) -> None:
        how = {0: "finished", 130: "interrupted", 143: "ended by SIGTERM"}[summary.exit_code]
        self.console.print(
            f"{how} at step {summary.step} of {self.total_steps}: loss {summary.loss:.4f}, "
            f"{summary.clips_per_s:.1f} clips/s\n"
            f"checkpoint {self.folder / LATEST}, curve {self.folder / 'loss.png'}", highlight=False, soft_wrap=True)
        broken = self.loader.broken()
        if broken:
            self.console.print(
                f"{len(broken)} of {self.loader.num_tried} videos could not be read and were replaced: "
                f"{self.folder / f'broken_r{self.processes.rank}.tsv'}", highlight=False, soft_wrap=True)
        if summary.exit_code:
            self.console.print("continue with --resume", highlight=False)
        elif self.cfg.train.probe and self.processes.is_first:
            from vjepa_fast.evaluation.demo import probe_table

            probe_table(self.cfg, self.model, self.synthetic, self.folder, self.console)


class _Speed:
    """Clips per second, leaving out the first steps, which warm up."""

    def __init__(self, start: int, warmup: int = 3) -> None:
        self.skip = warmup
        self.num_clips, self.seconds = 0, 0.0

    def add(self, num_clips: int, seconds: float) -> None:
        if self.skip > 0:
            self.skip -= 1
            return
        self.num_clips += num_clips
        self.seconds += seconds

    @property
    def clips_per_s(self) -> float:
        return self.num_clips / self.seconds if self.seconds else float("nan")


def _health(result: StepResult) -> dict[str, Any]:
    out = result.output
    pairs: tuple[tuple[str, Tensor], ...] = (("target", out.packed_targets), ("prediction", out.packed_predictions))
    spread = {f"{name}_std": feature_std(x) for name, x in pairs}
    return spread | {f"{name}_rank": effective_rank(x) for name, x in pairs}


def _run_process(rank: int, cfg: Config, resume: bool, profile: bool, folder: Path) -> int:
    try:
        return Trainer(cfg, resume=resume, profile=profile, folder=folder).fit().exit_code
    except UserError as error:
        if rank == 0:
            Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        os._exit(error.exit_code)


def run(cfg: Config, nproc: int = 1, resume: bool = False, profile: bool = False) -> int:
    """Train as the command line does.

    Args:
        cfg: what to do.
        nproc: processes on this machine.
        resume, profile: as Trainer.

    Returns:
        Exit code: 0 done, 130 interrupted, 143 ended by SIGTERM.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc is {nproc}; expected a positive number")
    folder = choose_folder(cfg, resume)
    try:
        if nproc == 1:
            return Trainer(cfg, resume=resume, profile=profile, folder=folder).fit().exit_code
        cfg.data.per_process(nproc)
        return launch(
            partial(_run_process, cfg=cfg, resume=resume, profile=profile, folder=folder), nproc)
    except OSError as error:
        raise UserError(f"cannot go on: {error.strerror or error}"
                        + (f": {error.filename}" if error.filename else "")) from error
