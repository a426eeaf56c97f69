"""Saves and resumes the checkpoints of a run, and reports what has changed since."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_fast.checkpoints.run_folder import LATEST_OF_V1, SHARDS, holds_run, newest_checkpoint
from vjepa_fast.checkpoints.sharded_writer import ShardedWriter
from vjepa_fast.checkpoints.writer import CheckpointWriter, check_whole, choose_whole
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.differences import leaves
from vjepa_fast.optim.dtensors import gather
from vjepa_fast.train.task import RunContext, Task

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
        # How the clips of a step are spread over processes; their number is compared by the task.
        "data.batch_size",
        "data.global_batch_size",
        # `auto` may mean another decoder than before: what it stands for is compared by the task.
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
class Position:
    """Where a run begins or goes on."""

    step: int = 0
    loss: float = float("nan")
    """Loss recorded in the checkpoint."""
    saved_step: int | None = None
    """Step of the newest checkpoint in the run folder, if the run resumes from it."""


class RunCheckpoints:
    """The checkpoints of a run: written, continued and gone back to.

    Args:
        context: of the run; optimization.ipe is set. Its console is told where the run goes on and what has changed.
        task: whose state the checkpoints hold.

    Attributes:
        writer: of the files; there once `start` has returned.
    """

    writer: CheckpointWriter | ShardedWriter

    def __init__(self, context: RunContext, task: Task) -> None:
        self.context, self.task = context, task
        self.cfg, self.folder, self.processes = context.cfg, context.folder, context.processes
        self._say = context.say

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
                    f"checkpoint {path} does not exist; this run starts from the weights of another run; name "
                    "its checkpoint with optimization.anneal_ckpt=FILE"
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
        info = self.task.load(path)
        if path == cfg.optimization.anneal_ckpt and path != latest:
            self._say(f"starting from the weights of {path}")
            return Position()
        own = info.get("vjepa_fast")
        assert cfg.optimization.ipe is not None
        if own is None:
            position = Position(int(info["epoch"]) * cfg.optimization.ipe)
            self.task.skip_to(position.step)
        else:
            self.task.load_state(own)
            self._warn_of_changes(own)
            position = Position(own["step"], info["loss"], own["step"]) if path == latest else Position(own["step"])
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
        self.task.collect()
        in_shards = isinstance(self.writer, ShardedWriter) or self.task.in_shards
        if not self.processes.is_first and not in_shards:
            return
        contents = self.task.contents(step, loss)
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
        self.task.roll_back_state(self.task.load(path)["vjepa_fast"])

    def _take_weights(self, path: Path) -> None:
        # Shards are checked when they are opened.
        file = newest_checkpoint(path) if path.is_dir() else path
        if self.processes.is_first and file is not None and not file.is_dir():
            check_whole(file)
        self._say(self.task.take_weights(path))

    def _warn_of_changes(self, own: dict[str, Any]) -> None:
        changed = [*changed_keys(own["config"], self.cfg.model_dump(mode="json")), *self.task.changes(own)]
        if changed:
            self._say(
                f"changed since the checkpoint was written: {', '.join(changed)}; the run continues, but "
                "differently than without the change",
                "yellow",
            )


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
