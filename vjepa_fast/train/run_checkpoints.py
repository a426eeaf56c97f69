"""What of a run its checkpoints hold, where it goes on from them, and what has changed since they were written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vjepa_fast
from vjepa_fast.checkpoints import meta_format, sharded_writer
from vjepa_fast.checkpoints.init_weights import init_weights
from vjepa_fast.checkpoints.run_folder import LATEST_OF_V1, SHARDS, holds_run, newest_checkpoint
from vjepa_fast.checkpoints.sharded_writer import ShardedWriter
from vjepa_fast.checkpoints.writer import CheckpointWriter, check_whole, choose_whole
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.differences import leaves
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed.parallel import is_sharded
from vjepa_fast.distributed.processes import Processes
from vjepa_fast.masking.sampler import StepMasks
from vjepa_fast.optim.dtensors import gather
from vjepa_fast.train.images_with_videos import JointMasks
from vjepa_fast.train.monitor.progress import RunConsole
from vjepa_fast.train.step import TrainStep

_HARMLESS = frozenset(
    {
        "train.out",
        "train.name",
        "train.device",
        "train.max_steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.save_every_freq",
        "train.auto_resume",
        "train.read_checkpoint",
        "train.tensorboard",
        "train.probe",
        "train.init_weights",
        "train.init_predictor",
        "train.needs_weights",
        "train.connect_timeout",
        "train.keep_last",
        "train.async_checkpoint",
        "train.watchdog",
        "train.shard_optimizer",
        "train.parallel",
        "train.checkpoint_format",
        "train.rollback_after",
        "train.max_rollbacks",
        "train.spike_factor",
        "data.num_workers",
        "data.prefetch",
        "data.pin_mem",
        "data.cache_dir",
        "data.max_broken",
        "data.device_prefetch",
        "data.dali_threads",
        "img_data.num_workers",
        # How the clips of a step are spread over processes; their number is compared by the trainer.
        "data.batch_size",
        "data.global_batch_size",
        # `auto` may mean another decoder than before: what it stands for is compared by the trainer.
        "data.backend",
        "model.use_activation_checkpointing",
        "model.activation_checkpointing",
        "model.compile_model",
        "model.attention",
        "train.cuda_graphs",
        "optimization.grad_accumulation",
        # Copies of keys of other sections.
        "data.seed",
        "model.crop_size",
        "model.num_frames",
        "model.patch_size",
        "model.tubelet_size",
        "model.dtype",
    }
)
"""Keys that do not change what is learned, or only as much as rounding does."""


@dataclass(frozen=True)
class Surroundings:
    """What a run depends on beside its config."""

    batch_size: int
    """Clips a process takes in a step."""
    global_batch: int
    """Clips of a step, over all processes."""
    global_images: int
    """Images of a step, over all processes."""
    backend: str
    """Decoder of the videos."""


@dataclass(frozen=True)
class Position:
    """Where a run begins or goes on."""

    step: int = 0
    loss: float = float("nan")
    """Of the checkpoint."""
    saved_step: int | None = None
    """Of the newest checkpoint in the run folder, if the run goes on from it."""


class RunCheckpoints:
    """The checkpoints of a run: written, continued and gone back to.

    Args:
        cfg: of the run; optimization.ipe is set.
        folder: run folder.
        train_step, masks: whose states the checkpoints hold.
        surroundings: compared with those of the run that is continued.
        processes: of the run.
        console: told where the run goes on and what has changed.

    Attributes:
        writer: of the files; there once `start` has returned.
    """

    writer: CheckpointWriter | ShardedWriter

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        train_step: TrainStep,
        masks: StepMasks | JointMasks,
        surroundings: Surroundings,
        processes: Processes,
        console: RunConsole,
    ) -> None:
        self.cfg, self.folder, self.train_step, self.masks = cfg, folder, train_step, masks
        self.surroundings, self.processes, self.console = surroundings, processes, console

    def start(self, resume: bool) -> Position:
        """Weights, optimizer and position from a checkpoint, if the config or the folder names one.

        Args:
            resume: continue the run in the run folder.

        Raises:
            UserError: the checkpoint is not there, is damaged, or does not fit.
        """
        position = self._start(resume)
        train = self.cfg.train
        kind = ShardedWriter if self.cfg.sharded_checkpoints else CheckpointWriter
        newest = newest_checkpoint(self.folder)
        step_of_file = None if newest is None or newest.suffix == SHARDS else position.saved_step
        self.writer = kind(self.folder, train.keep_last, train.async_checkpoint, step_of_file)
        return position

    def _start(self, resume: bool) -> Position:
        cfg = self.cfg
        latest, of_v1 = newest_checkpoint(self.folder), self.folder / f"{cfg.train.name}{LATEST_OF_V1}"
        resumed = resume and holds_run(self.folder)
        if resumed:
            path = choose_whole(self.folder, self.processes, self._say)
        elif cfg.train.read_checkpoint is not None:
            path = cfg.train.read_checkpoint
        elif cfg.optimization.anneal_ckpt is not None:
            path = cfg.optimization.anneal_ckpt
            if not path.exists():
                raise UserError(
                    f"checkpoint {path} does not exist; this run starts from the weights of another, of "
                    "which optimization.anneal_ckpt=FILE says where its checkpoint is"
                )
        elif resume and of_v1.exists():
            path = of_v1
        else:
            if resume and not cfg.train.auto_resume:
                self._say(f"nothing to resume in {self.folder}: starting from the beginning")
            if cfg.train.init_weights is not None:
                self._take_weights(cfg.train.init_weights)
            return Position()
        if self.processes.is_first and not resumed:
            check_whole(path)
        info = self._load(path)
        if path == cfg.optimization.anneal_ckpt and path != latest:
            self._say(f"starting from the weights of {path}")
            return Position()
        own = info.get("vjepa_fast")
        assert cfg.optimization.ipe is not None
        position = Position(int(info["epoch"]) * cfg.optimization.ipe)
        if own is not None:
            self.masks.load_state_dict(own["masks"])
            self._set_outliers(own)
            self._warn_of_changes(own)
            position = Position(own["step"])
            if path == latest:
                position = Position(own["step"], info["loss"], own["step"])
        elif self.masks.reference is not None:
            for _ in range(position.step):
                self.masks.reference.step()
        self._say(f"continuing {path} at step {position.step}")
        return position

    def save(self, step: int, loss: float, also: Path | None) -> None:
        """Write a checkpoint; all processes call it. Of a single file the first one is the writer.

        Args:
            step: steps done.
            loss: of the last of them.
            also: a second name, under which the checkpoint stays for good.

        Raises:
            UserError: as CheckpointWriter.write.
        """
        self.train_step.optimizer.collect()
        in_shards = isinstance(self.writer, ShardedWriter) or is_sharded(self.train_step.model)
        if not self.processes.is_first and not in_shards:
            return
        opt, now, outliers = self.cfg.optimization, self.surroundings, self.train_step.outliers
        assert opt.ipe is not None
        # With masks from the reference's stream every process has a state; this one's is kept.
        contents = meta_format.to_checkpoint(
            self.train_step.model,
            self.train_step.optimizer,
            epoch=step // opt.ipe,
            loss=loss,
            batch_size=now.batch_size,
            world_size=self.processes.world_size,
            lr=opt.lr,
            scaler=self.train_step.scaler,
            extra={
                "version": vjepa_fast.__version__,
                "step": step,
                "global_batch": now.global_batch,
                "global_images": now.global_images,
                "backend": now.backend,
                "masks": self.masks.state_dict(),
                "last_losses": None if outliers is None else outliers.state_dict(),
                "config": self.cfg.model_dump(mode="json"),
            },
        )
        if not in_shards or isinstance(self.writer, ShardedWriter):
            self.writer.write(contents, step, also)
            return
        contents = gather(contents, self.processes.is_first)
        if self.processes.is_first:
            self.writer.write(contents, step, also, copied=True)

    def roll_back(self) -> None:
        """Weights, optimizer and target encoder of the last checkpoint of this run; all processes call it."""
        self.writer.wait()
        self.processes.wait()
        path = newest_checkpoint(self.folder)
        assert path is not None
        self._set_outliers(self._load(path)["vjepa_fast"])

    def _load(self, path: Path) -> dict[str, Any]:
        step = self.train_step
        # What is loaded is held against the weights that are there.
        step.optimizer.refresh()
        read = sharded_writer.load if path.is_dir() else meta_format.load_checkpoint
        return read(path, step.model, step.optimizer, step.scaler)

    def _take_weights(self, path: Path) -> None:
        # Shards are checked when they are opened.
        file = newest_checkpoint(path) if path.is_dir() else path
        if self.processes.is_first and file is not None and not file.is_dir():
            check_whole(file)
        self.train_step.optimizer.refresh()
        self._say(init_weights(path, self.train_step.model, self.cfg.train.init_predictor))

    def _set_outliers(self, own: dict[str, Any]) -> None:
        if self.train_step.outliers is not None and own.get("last_losses") is not None:
            self.train_step.outliers.load_state_dict(own["last_losses"])

    def _warn_of_changes(self, own: dict[str, Any]) -> None:
        now = self.surroundings
        changed = changed_keys(own["config"], self.cfg.model_dump(mode="json"))
        if own["global_batch"] != now.global_batch:
            changed.append(f"clips a step {own['global_batch']} -> {now.global_batch}")
        if own.get("global_images", now.global_images) != now.global_images:
            changed.append(f"images a step {own['global_images']} -> {now.global_images}")
        # Decoders differ in colours. Checkpoints of earlier versions do not say which it was.
        if own.get("backend", now.backend) != now.backend:
            changed.append(f"decoder {own['backend']} -> {now.backend}")
        if changed:
            self.console.print(
                f"changed since the checkpoint was written: {', '.join(changed)}; the run goes on, but not as it would "
                "have without the change",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key old -> new` for every key that changes what is learned; keys that one side lacks are not compared.

    Args:
        old, new: configs as `Config.model_dump(mode="json")` gives them.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key} {before[key]} -> {after[key]}"
        for key in before
        if key in after and key not in _HARMLESS and before[key] != after[key]
    ]
