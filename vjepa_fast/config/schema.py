"""The schema of a run's config: typed, validated, the single source of every default.

The keys are the reference's own (facebookresearch/vjepa2, app/vjepa/train.py) wherever it has one, so that somebody
who knows its YAML files knows ours. Where sizes appear in two sections (the model needs the crop size, so does the
loader), `data` is the place to write them and the model's copy is filled in.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.sections.base import Checkpointing, Dtype, Section, Switch
from vjepa_fast.config.sections.data import AugmentationConfig, DataConfig, ImageDataConfig
from vjepa_fast.config.sections.masks import MaskConfig, MaskSpec
from vjepa_fast.config.sections.model import MODEL_NAMES, LossConfig, ModelConfig
from vjepa_fast.config.sections.run import OptimizationConfig, TrainConfig

__all__ = [
    "MODEL_NAMES",
    "AugmentationConfig",
    "Checkpointing",
    "Config",
    "DataConfig",
    "Dtype",
    "ImageDataConfig",
    "LossConfig",
    "MaskConfig",
    "MaskSpec",
    "ModelConfig",
    "OptimizationConfig",
    "Section",
    "Switch",
    "TrainConfig",
]


class Config(Section):
    """A whole run: `vjepa_fast.load_config`, `vjepa_fast.load_recipe`."""

    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    data: DataConfig = DataConfig()
    img_data: ImageDataConfig | None = None
    """None: videos only."""
    img_mask: MaskConfig | None = None
    """Masks of images; None: those of `mask`."""
    loss: LossConfig = LossConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fill(self) -> Config:
        derived = {
            "crop_size": self.data.crop_size,
            "patch_size": self.data.patch_size,
            "tubelet_size": self.data.tubelet_size,
            "num_frames": max(self.data.dataset_fpcs),
        }
        for name, value in derived.items():
            own = getattr(self.model, name)
            if own is None:
                setattr(self.model, name, value)
            elif own != value:
                raise ValueError(f"model.{name} is {own} but the data section says {value}; set it in data only")
        if "return_all_tokens" in self.model.model_fields_set and (
            self.model.return_all_tokens != self.loss.predict_all
        ):
            raise ValueError(
                f"model.return_all_tokens is {str(self.model.return_all_tokens).lower()} but "
                f"loss.predict_all is {str(self.loss.predict_all).lower()}; set it in loss only"
            )
        if self.loss.predict_all and self.model.n_output_distillation is None:
            raise ValueError("loss.predict_all is of V-JEPA 2.1; set model.n_output_distillation to 4 as well")
        self.model.return_all_tokens = self.loss.predict_all
        self._check_images()
        if self.model.num_mask_tokens is None:
            by_mask = self.model.mask_token_by == "mask"
            self.model.num_mask_tokens = len(self.mask.masks) * (1 if by_mask else len(self.data.dataset_fpcs))
        if self.model.model_name.endswith("_rope"):
            self.model.use_rope = True
        for section, name, value in ((self.model, "dtype", self.train.dtype), (self.data, "seed", self.train.seed)):
            own = getattr(section, name)
            if name in section.model_fields_set and own != value:
                where = "model" if section is self.model else "data"
                raise ValueError(f"{where}.{name} is {own} but train.{name} is {value}; set it in train only")
            setattr(section, name, value)
        self._check_start()
        if self.train.shard_optimizer and self.train.dtype == "float16":
            raise ValueError(
                "train.shard_optimizer has no part in the loss scale of train.dtype=float16; set "
                "train.dtype=bfloat16, or train.shard_optimizer=false"
            )
        if self.mask.clips_per_mask not in (1, self.data.clips_per_video):
            raise ValueError(
                f"mask.clips_per_mask is {self.mask.clips_per_mask}, but data.clips_per_video is "
                f"{self.data.clips_per_video}; expected that number, or 1 for masks of its own for every "
                "clip"
            )
        if self.mask.group_size is None:
            self.mask.group_size = self.data.batch_size or self.data.global_batch_size
        return self

    @property
    def _start(self) -> dict[str, Path]:
        """What a run starts from, by key."""
        keys = {
            "train.init_weights": self.train.init_weights,
            "train.read_checkpoint": self.train.read_checkpoint,
            "optimization.anneal_ckpt": self.optimization.anneal_ckpt,
        }
        return {key: path for key, path in keys.items() if path is not None}

    def _check_start(self) -> None:
        others = [key for key in self._start if key != "train.init_weights"]
        if self.train.init_weights is not None and others:
            raise ValueError(
                f"train.init_weights and {others[0]} are both set, and a run starts from one of them; set "
                f"{others[0]}=null for the weights alone, with a new optimizer"
            )

    def _check_images(self) -> None:
        if self.img_data is None:
            if self.img_mask is not None:
                raise ValueError(
                    "img_mask is set but img_data is not; say in img_data what images to train on, or set "
                    "img_mask to null too"
                )
            return
        if self.model.img_temporal_dim_size is None:
            raise ValueError(
                "img_data needs a model that takes images as well as videos; set model.img_temporal_dim_size to 1"
            )
        share = self.img_data.batch_size * self.img_data.rank_ratio
        if share != int(share) or share < 1:
            raise ValueError(
                f"img_data.batch_size {self.img_data.batch_size} times rank_ratio "
                f"{self.img_data.rank_ratio:g} is {share:g} images for each process; expected a whole "
                "number, at least 1"
            )

    @property
    def sharded_checkpoints(self) -> bool:
        """Whether checkpoints are folders of shards."""
        return (self.train.checkpoint_format or ("sharded" if self.train.parallel == "fsdp" else "meta")) == "sharded"

    def check_trainable(self) -> None:
        """What only training needs.

        Raises:
            ConfigError: data.datasets is empty, or img_data.datasets, or the model serves inference only, or there are
                no weights to start from and the config needs some.
        """
        if self.train.needs_weights and not self._start:
            raise ConfigError(
                "train.init_weights is not set, and this config goes on from a trained model; say from "
                "which, as in train.init_weights=vitl.pt: Meta's ViT-L is at "
                "https://dl.fbaipublicfiles.com/vjepa2/vitl.pt, the README of facebookresearch/vjepa2 "
                "lists the others"
            )
        if not self.data.datasets:
            raise ConfigError(
                "data.datasets is empty; say what to train on: a CSV of `path label` lines, a folder of "
                "videos, an .npy or a glob, as in data.datasets=[train_paths.csv]"
            )
        if self.model.teacher_embed_dim is not None:
            raise ConfigError(
                f"model.teacher_embed_dim is {self.model.teacher_embed_dim}: this model predicts the "
                "features of another one, which it was distilled from, and cannot be trained here; set "
                "it to null to train a model of its own"
            )
        if self.img_data is not None and not self.img_data.datasets:
            raise ConfigError(
                "img_data.datasets is empty; say what images to train on: a CSV of their paths or a "
                "folder, as in img_data.datasets=[images.csv], or train on videos alone with "
                "img_data=null img_mask=null"
            )
        if self.train.parallel == "fsdp":
            self._check_sharded()

    def _check_sharded(self) -> None:
        """Raises ConfigError where something does not go with train.parallel=fsdp."""
        lengths = sorted(set(self.data.dataset_fpcs))
        refused = {
            "train.shard_optimizer is set, but the optimizer's state is sharded with the parameters": (
                self.train.shard_optimizer,
                "leave it out",
            ),
            "train.dtype is float16, whose loss scale each process would choose for itself": (
                self.train.dtype == "float16",
                "set train.dtype=bfloat16",
            ),
            "model.target_precision is float8, whose copies of weights are made of whole parameters": (
                self.model.target_precision == "float8",
                "leave it out",
            ),
            f"data.dataset_fpcs has clips of {lengths} frames, and a process may get none of one length": (
                len(lengths) > 1,
                "train on clips of one length",
            ),
        }
        for what, (is_so, advice) in refused.items():
            if is_so:
                raise ConfigError(f"train.parallel is fsdp and {what}; {advice}, or set train.parallel=ddp")
