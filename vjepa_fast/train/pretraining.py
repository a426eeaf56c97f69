"""V-JEPA pretraining as a task of the training loop (vjepa_fast.train.task.Task)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vjepa_fast
from vjepa_fast.checkpoints import meta_format, sharded_writer
from vjepa_fast.checkpoints.init_weights import init_weights
from vjepa_fast.common.cache_dir import default_cache_dir
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.common.rng import Stream, pack_tag, random_words
from vjepa_fast.data.decode import dali
from vjepa_fast.data.decode.choose_backend import choose
from vjepa_fast.data.generated.registry import SYNTHETIC, make_sets
from vjepa_fast.data.loader import Batch, Loader, build_loader
from vjepa_fast.distributed.parallel import data_parallel, is_sharded, optimizer_of, shard
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.masking.sampler import StepMasks
from vjepa_fast.models.compiled_blocks import require_compiler
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.train.images_with_videos import JointLoader, JointMasks, add_image_masks, add_images
from vjepa_fast.train.monitor.out_of_memory import explain, is_out_of_memory
from vjepa_fast.train.monitor.run_health import RunHealth
from vjepa_fast.train.speed.speedups import SpeedUps, StepCallable, Trial
from vjepa_fast.train.step import StepResult, TrainStep
from vjepa_fast.train.task import RunContext

NUM_EXPECTED = 256
"""Steps whose masks tell for which sizes CUDA graphs are captured."""


class Pretraining:
    """Clips, masks, model and step of a run of V-JEPA. As vjepa_fast.train.task.Task.

    Args:
        context: of the run; optimization.ipe and train.probe of its config are filled in.

    Attributes:
        manifests: of the sets that the package makes itself, by their names in data.datasets.

    Raises:
        ConfigError, UserError: something is wrong with the configuration or the data.
    """

    def __init__(self, context: RunContext) -> None:
        self.context, self.cfg = context, context.cfg
        self.device, self.processes = context.device, context.processes
        self.batch_size = self.cfg.data.per_process(self.processes.world_size)
        self.global_batch = self.batch_size * self.processes.world_size
        self.backend = choose(self.cfg.data.backend, self.device)
        videos = self._load_videos()
        torch.manual_seed(self.cfg.train.seed)
        self.model = self._build_model()
        self.masks: StepMasks | JointMasks = self._build_masks(videos)
        self.train_step = self._build_step(len(videos.fpcs))
        self.speed_ups = SpeedUps(self.cfg, self.train_step, self.processes, context.say)
        self.health = RunHealth(self.cfg, context.folder, partial(context.say, style="bold yellow"))
        self._run: StepCallable | None = None

    @property
    def global_images(self) -> int:
        """Images of a step, over all processes."""
        return 0 if self.cfg.img_data is None else self.cfg.img_data.per_process * self.processes.world_size

    def _load_videos(self) -> Loader:
        cfg = self.cfg
        if SYNTHETIC not in cfg.data.datasets:
            if cfg.train.probe is True:
                raise ConfigError(
                    f"train.probe needs the labels of the clips that {SYNTHETIC!r} stands for; "
                    "set train.probe=false for other data"
                )
            cfg.train.probe = False
        cache = cfg.data.cache_dir or default_cache_dir()
        self.manifests = make_sets(
            cfg.data.datasets, cache, self.processes.is_first, self.processes.wait, self.context.say
        )
        names = [str(self.manifests.get(name, name)) for name in cfg.data.datasets]
        data = cfg.data.model_copy(update={"datasets": names})
        rank, world_size = self.processes.rank, self.processes.world_size
        videos = build_loader(data, rank, world_size, self.device)
        self.loader: Loader | JointLoader = videos
        if cfg.img_data is not None:
            self.loader = add_images(videos, cfg, rank, world_size, self.device)
        if cfg.optimization.ipe is None:
            cfg.optimization.ipe = max(1, self.loader.clips_per_epoch // self.global_batch)
        return videos

    def _build_model(self) -> VJEPA:
        if self.cfg.model.compile_model is True:
            require_compiler(self.device)
        model = VJEPA.from_config(self.cfg)
        if self._wants_shards:
            shard(model, self.device, self.cfg.train.grad_dtype)
        return model.to(self.device)

    @property
    def _wants_shards(self) -> bool:
        return self.cfg.train.parallel == "fsdp" and self.processes.distributed

    def _build_masks(self, videos: Loader) -> StepMasks | JointMasks:
        cfg, rank, world_size = self.cfg, self.processes.rank, self.processes.world_size
        masks = StepMasks(
            cfg.mask,
            fpcs=videos.fpcs,
            crop_size=cfg.data.crop_size,
            patch_size=cfg.data.patch_size,
            tubelet_size=cfg.data.tubelet_size,
            seed=cfg.train.seed,
            global_batch=self.global_batch,
            group_of=videos.group_of,
            rank=rank,
            world_size=world_size,
            sum_over_processes=self.processes.sum_on_host,
        )
        return masks if cfg.img_data is None else add_image_masks(masks, cfg, rank, world_size)

    def _build_step(self, num_groups: int) -> TrainStep:
        model, cfg, world_size = self.model, self.cfg, self.processes.world_size
        if not self.processes.distributed or self._wants_shards:
            return TrainStep(model, cfg, None, world_size, AdamWEMA)
        wrapped = data_parallel(model, cfg, num_groups)
        return TrainStep(model, cfg, wrapped, world_size, optimizer_of(model, cfg, num_groups))

    def masks_of(self, batch: Batch) -> list[MaskBatch]:
        """The masks of a batch of this run, on its device."""
        return self.masks(batch.step, batch.sample_ids, batch.group_ids, self.device)

    def run_step(self, batch: Batch) -> StepResult:
        """Masks, forward, backward, update. The first call settles what is set to `auto`."""
        masks = self.masks_of(batch)
        # Drop path and noised targets draw from torch's generator; this makes a resumed run draw the same.
        words = random_words(self.cfg.train.seed, self.processes.rank, batch.step, pack_tag(Stream.DROP_PATH))
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        if self._run is None:
            self._run = self._choose_step(batch, masks)
        try:
            return self._run(batch.step, batch.clips, masks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
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
        return self.speed_ups.choose(trials, sizes, len(self.loader.fpcs), self.context.profiled)

    def announce(self) -> None:
        """As Task."""
        cfg, say = self.cfg, self.context.say
        counts = [_num_parameters(network) / 1e6 for network in (self.model.encoder, self.model.predictor)]
        tokens = " + ".join(str(t * h * w) for t, h, w in self.masks.grids)
        and_images, images = "", ""
        if cfg.img_data is not None:
            and_images, images = " and images", f" and {self.global_images} images"
        many = f", {self.processes.world_size} processes" if self.processes.distributed else ""
        self.context.console.print(
            f"{cfg.model.model_name}: encoder {counts[0]:.1f} M, predictor {counts[1]:.1f} M parameters, "
            f"{tokens} tokens a clip\n{self.loader.num_videos} videos{and_images}, {self.global_batch} clips{images} "
            f"a step, {self.device.type}{many}, {cfg.train.dtype}\n"
            f"run folder {self.context.folder}",
            highlight=False,
            soft_wrap=True,
        )
        if self.device.type == "cuda" and cfg.data.backend == "auto" and self.backend == "pyav":
            say(f"PyAV decodes, on the CPU: {dali.missing(self.device)}")
        if cfg.model.compile_model is True:
            say("model.compile_model is set: the first step compiles, which may take a minute or two")
        if self.speed_ups.measures:
            say("what is set to auto is measured before the first step, which may take a minute or two")

    def about(self) -> dict[str, Any]:
        """As Task."""
        names = self.cfg.data.datasets
        manifests = [name if "://" in name else str(Path(self.manifests.get(name, name)).absolute()) for name in names]
        return {
            "encoder_parameters": _num_parameters(self.model.encoder),
            "predictor_parameters": _num_parameters(self.model.predictor),
            "videos": self.loader.num_videos,
            "manifests": manifests,
            "held_out": str(self.manifests[names[0]].with_name("val.csv")) if names[0] in self.manifests else None,
            "clips_a_step": self.global_batch,
            "images_a_step": self.global_images,
            "processes": self.processes.world_size,
        }

    def rewind_health(self, jsonl_path: Path) -> None:
        """As Task."""
        self.health.rewind(jsonl_path)

    def metrics(self, outcome: StepResult) -> dict[str, float]:
        """As Task: the health of the model."""
        return self.health.figures(outcome.part_norms, outcome.output, self.model)

    def watch(self, row: Mapping[str, float | None]) -> None:
        """As Task: warns of a collapse."""
        self.health.observe(row)

    def verdict(self) -> None:
        """As Task."""
        if health := self.health.summary():
            self.context.say(health, "bold yellow" if self.health.num_warnings else None)

    @property
    def in_shards(self) -> bool:
        """As Task."""
        return is_sharded(self.model)

    def collect(self) -> None:
        """As Task."""
        self.train_step.optimizer.collect()

    def contents(self, step: int, loss: float) -> dict[str, Any]:
        """As Task: the reference's layout (vjepa_fast.checkpoints.meta_format)."""
        opt, outliers = self.cfg.optimization, self.train_step.outliers
        assert opt.ipe is not None
        # With masks from the reference's stream every process has a state; this one's is kept.
        return meta_format.to_checkpoint(
            self.model,
            self.train_step.optimizer,
            epoch=step // opt.ipe,
            loss=loss,
            batch_size=self.batch_size,
            world_size=self.processes.world_size,
            lr=opt.lr,
            scaler=self.train_step.scaler,
            extra={
                "version": vjepa_fast.__version__,
                "step": step,
                "global_batch": self.global_batch,
                "global_images": self.global_images,
                "backend": self.backend,
                "masks": self.masks.state_dict(),
                "last_losses": None if outliers is None else outliers.state_dict(),
                "config": self.cfg.model_dump(mode="json"),
            },
        )

    def load(self, path: Path) -> dict[str, Any]:
        """As Task."""
        step = self.train_step
        # What is loaded is held against the weights that are there.
        step.optimizer.refresh()
        read = sharded_writer.load if path.is_dir() else meta_format.load_checkpoint
        return read(path, step.model, step.optimizer, step.scaler)

    def load_state(self, own: Mapping[str, Any]) -> None:
        """As Task: the masks' stream and the last losses."""
        self.masks.load_state_dict(own["masks"])
        self.roll_back_state(own)

    def roll_back_state(self, own: Mapping[str, Any]) -> None:
        """As Task: the last losses."""
        if self.train_step.outliers is not None and own.get("last_losses") is not None:
            self.train_step.outliers.load_state_dict(own["last_losses"])

    def skip_to(self, step: int) -> None:
        """As Task: the reference's stream of masks is the only thing that counts."""
        if self.masks.reference is not None:
            for _ in range(step):
                self.masks.reference.step()

    def take_weights(self, path: Path) -> str:
        """As Task."""
        self.train_step.optimizer.refresh()
        return init_weights(path, self.model, self.cfg.train.init_predictor)

    def changes(self, own: Mapping[str, Any]) -> list[str]:
        """As Task."""
        changed = []
        if own["global_batch"] != self.global_batch:
            changed.append(f"clips a step {own['global_batch']} -> {self.global_batch}")
        if own.get("global_images", self.global_images) != self.global_images:
            changed.append(f"images a step {own['global_images']} -> {self.global_images}")
        # Decoders differ in colours. Checkpoints of earlier versions do not say which it was.
        if own.get("backend", self.backend) != self.backend:
            changed.append(f"decoder {own['backend']} -> {self.backend}")
        return changed


def _num_parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
