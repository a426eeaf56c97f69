"""What a run is made of: typed, validated, the single source of every default.

The keys are the reference's own (facebookresearch/vjepa2, app/vjepa/train.py) wherever it has one, so that somebody
who knows its YAML files knows ours. Where sizes appear in two sections (the model needs the crop size, so does the
loader), `data` is the place to write them and the model's copy is filled in.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vjepa_fast.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
Range = tuple[float, float]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

MODEL_NAMES = (
    "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant", "vit_giant_xformers", "vit_gigantic",
    "vit_gigantic_xformers",
)
"""Each may end in `_rope`."""


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    """One name for a list of one. To YAML, `synthetic:` without quotes is a mapping with an empty value."""
    values = value if isinstance(value, list) else [value] if isinstance(value, (str, dict)) else None
    if values is None:
        return value
    return [f"{next(iter(v))}:" if isinstance(v, dict) and list(v.values()) == [None] else v for v in values]


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(arg is True or _takes_bool(arg) for arg in get_args(annotation))


Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_pair)]


class Section(BaseModel):
    """Unknown keys are errors, and so are infinities, not-a-number and true or false where a number belongs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _reject_bool(cls, value: Any) -> Any:
        """YAML turns a bare `on` or `yes` into true, which would then pass for the number 1."""
        if isinstance(value, dict):
            for name, given in value.items():
                field = cls.model_fields.get(name)
                if isinstance(given, bool) and field is not None and not _takes_bool(field.annotation):
                    raise ValueError(f"{name} is {str(given).lower()}; it does not take true or false")
        return value


Checkpointing = Literal["none", "full", "selective"]
Switch = Literal[True, False, "auto"]


class ModelConfig(Section):
    """Encoder, predictor and target encoder."""

    model_name: str = "vit_large"
    """One of MODEL_NAMES; the suffix `_rope` sets use_rope."""
    objective: Literal["latent", "pixels"] = "latent"
    """What is predicted: features of the target encoder, or normalised pixels, as a masked autoencoder does with the
    same encoder, the predictor as its decoder and the same masks; a baseline. No target encoder runs then."""
    embed_dim: PositiveInt | None = None
    """Overrides the width of `model_name`; likewise depth, num_heads and mlp_ratio."""
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    crop_size: Size | None = None
    """Pixels, height and width; taken from data.crop_size."""
    num_frames: PositiveInt | None = None
    """Longest clip in frames; taken from max(data.dataset_fpcs). 1 makes an image model (2-D patch embedding)."""
    patch_size: PositiveInt | None = None
    tubelet_size: PositiveInt | None = None
    use_rope: bool = True
    rope_style: Literal["tiled", "interleaved"] = "tiled"
    """How an angle is spread over a pair of elements: `tiled` is V-JEPA 2, `interleaved` is V-JEPA 2.1."""
    rope_precision: Literal["fp32", "reference"] = "fp32"
    """Angles and products of half-precision models: exact, or rounded wherever the reference rounds under autocast."""
    target_precision: Literal["same", "float8"] = "same"
    """`float8` runs the linear layers of the target encoder's blocks in float8: inexact, an experiment."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Of a model without RoPE: fixed sines and cosines, or trained vectors: in the encoder the sum of one for the frame
    of tokens and one for the place in it, in the predictor one for each token of a clip."""
    uniform_power: bool = False
    init: Literal["vjepa2", "vjepa1", "xavier", "xavier_uniform", "xavier_normal"] = "vjepa2"
    """Weights of linear and convolution layers: normal with std 0.02, in V-JEPA 2 with the output projections of block
    i divided by sqrt(2 i), in V-JEPA 1 without that; `xavier` is uniform by the numbers of inputs and outputs, also
    without that; the last two are V-JEPA 2.1's init_type, of the encoder alone: the predictor begins as `vjepa2`."""
    use_silu: bool = False
    use_pred_silu: bool = False
    wide_silu: bool = True
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pred_depth: PositiveInt = 12
    pred_embed_dim: PositiveInt = 384
    pred_num_heads: PositiveInt | None = None
    """None: as many as the encoder."""
    use_mask_tokens: bool = True
    """False: the predictor is given noised target features in place of mask tokens, an option of V-JEPA 1."""
    num_mask_tokens: PositiveInt | None = None
    """None: number of masks times number of datasets, as the reference counts; the number of masks where each of them
    has one."""
    mask_token_by: Literal["group", "mask"] = "group"
    """What has a mask token of its own: a frames-per-clip group (V-JEPA 2), or a mask (V-JEPA 1)."""
    zero_init_mask_tokens: bool = True
    n_output_distillation: Literal[1, 4] | None = None
    """V-JEPA 2.1: from how many depths of the encoder the features are taken, each with a norm of its own, and side by
    side what the predictor gets and predicts. 1 is what the distilled ViT-B and ViT-L have. None: V-JEPA 1 and 2."""
    teacher_embed_dim: PositiveInt | None = None
    """Width of what the predictor predicts where that is not the encoder's: that of the teacher a checkpoint was
    distilled from. Such a model serves inference only."""
    return_all_tokens: bool = False
    """The predictor has a second head, for context tokens; taken from loss.predict_all."""
    img_temporal_dim_size: Literal[1] | None = None
    """Clips of so many frames are images: they have a patch embedding of their own, with tubelets of one frame."""
    modality_embedding: bool = False
    """One learned vector for all tokens of a video and one for those of an image, in encoder and predictor; needs
    img_temporal_dim_size."""
    interpolate_rope: bool = False
    """Rows and columns of any grid span the positions of a 256-pixel one (252 pixels at patch size 14)."""
    attention: Literal["auto", "fa4", "fa3", "fa2", "varlen", "xformers", "sdpa"] = "auto"
    """What computes attention: by measurement, or FlashAttention 4, 3, 2, torch's two, xformers. The environment
    variable VJEPA_FAST_ATTENTION comes before it; `vjepa-fast doctor` says which can be used."""
    use_activation_checkpointing: bool = False
    """The reference's key; see activation_checkpointing."""
    activation_checkpointing: Checkpointing | None = None
    """What a block keeps for the backward: `none` recomputes nothing, `full` keeps its input only, `selective` also
    the results of matrix products and attention. None: full if use_activation_checkpointing, else none."""
    compile_model: Switch = False
    """Compile the parts of a block around attention, for all layers at once (the reference: whole networks). `auto`:
    if that is faster in a few steps that training times at its beginning; elsewhere it means false."""
    dtype: Dtype = "float32"
    """Compute dtype; the parameters are fp32. Taken from train.dtype."""

    @property
    def checkpointing(self) -> Checkpointing:
        """What holds, by both keys."""
        return self.activation_checkpointing or ("full" if self.use_activation_checkpointing else "none")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        known = [*MODEL_NAMES, *(f"{name}_rope" for name in MODEL_NAMES)]
        if self.model_name not in known:
            nearest = get_close_matches(self.model_name, known, n=1, cutoff=0)[0]
            raise ValueError(f"model_name is {self.model_name!r}; did you mean {nearest}? "
                             f"Known: {', '.join(MODEL_NAMES)}, each also with _rope at the end")
        if self.positions == "learned" and (self.use_rope or self.model_name.endswith("_rope")):
            raise ValueError("positions is learned, but RoPE is on, which takes their place; set use_rope to false")
        if self.modality_embedding and self.img_temporal_dim_size is None:
            raise ValueError("modality_embedding tells videos from images, of which there are none; set "
                             "img_temporal_dim_size to 1")
        if self.return_all_tokens and self.n_output_distillation is None:
            raise ValueError("return_all_tokens (from loss.predict_all) is of V-JEPA 2.1; set n_output_distillation to "
                             "4 as well")
        if self.n_output_distillation is not None and not (self.use_rope or self.model_name.endswith("_rope")):
            raise ValueError("n_output_distillation is of V-JEPA 2.1, which has rotary positions only; set use_rope to "
                             "true")
        if self.n_output_distillation is not None and not self.use_mask_tokens:
            raise ValueError("n_output_distillation is of V-JEPA 2.1, whose predictor starts from mask tokens; set "
                             "use_mask_tokens to true")
        if self.objective == "pixels" and (
                self.n_output_distillation is not None or not self.use_mask_tokens
                or self.img_temporal_dim_size is not None):
            raise ValueError("objective is pixels, a baseline for videos with mask tokens; set n_output_distillation "
                             "and img_temporal_dim_size to null and use_mask_tokens to true, or objective to latent")
        if self.teacher_embed_dim is not None and self.n_output_distillation is None:
            raise ValueError("teacher_embed_dim is of V-JEPA 2.1; set n_output_distillation as well")
        return self


MaskStrategy = Literal["multiblock", "tube", "temporal", "patches", "mixture", "future"]


class MaskSpec(Section):
    """One mask; the default strategy is the reference's (src/masks/multiseq_multiblock3d.py).

    `multiblock` predicts blocks of one size a step and takes spatial_scale, temporal_scale, aspect_ratio and
    num_blocks. The others predict the share `ratio`: `tube` the same random places in every frame, `patches` random
    places in each frame, `temporal` consecutive frames, `mixture` one of the two by clip, `future` the last frames.
    """

    strategy: MaskStrategy = "multiblock"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share that is predicted; every strategy but multiblock."""
    round_context_down: bool = False
    """Of `tube`: see int(places * (1 - ratio)) places of a frame, V-JEPA 1's rule; else the number of those predicted
    is rounded to the nearest."""
    temporal_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the clips that are masked like `temporal` in a `mixture`; the others are like `patches`."""
    spatial_scale: Range = (0.2, 0.8)
    """Area of one block as a fraction of the frame: drawn uniformly between the two."""
    temporal_scale: Range = (1.0, 1.0)
    aspect_ratio: Range = (0.3, 3.0)
    """Height over width of a block."""
    num_blocks: Annotated[int, Field(gt=0, le=1024)] = 1
    max_temporal_keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The context comes from the first fraction of the clip only."""
    max_keep: PositiveInt | None = None
    """Longest context in tokens."""
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False
    """Swap the roles: the blocks are the context."""

    @model_validator(mode="after")
    def _check(self) -> MaskSpec:
        for name, top in (("spatial_scale", 1.0), ("temporal_scale", 1.0), ("aspect_ratio", 255.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} is [{low}, {high}]; expected 0 < low <= high <= {top:g}")
        if self.full_complement and self.pred_full_complement:
            raise ValueError("full_complement and pred_full_complement exclude each other; set one of them to false")
        unused = {"spatial_scale", "temporal_scale", "aspect_ratio", "num_blocks"}
        if self.strategy == "multiblock":
            unused = {"ratio", "temporal_probability", "round_context_down"}
        else:
            unused |= {"temporal_probability"} if self.strategy != "mixture" else set()
            unused |= {"round_context_down"} if self.strategy != "tube" else set()
        # A written config names every key, so only a value that would have changed something counts.
        changed = [name for name in type(self).model_fields
                   if name in unused and getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"strategy {self.strategy} does not use {' and '.join(changed)}; remove "
                             f"{'it' if len(changed) == 1 else 'them'} or choose another strategy")
        return self


class MaskConfig(Section):
    """All masks of a clip. A bare list of masks is accepted for `masks`."""

    masks: Annotated[list[MaskSpec], Field(min_length=1, max_length=64)] = [
        MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=8),
        MaskSpec(spatial_scale=(0.7, 0.7), aspect_ratio=(0.75, 1.5), num_blocks=2),
    ]
    source: Literal["counter", "reference"] = "counter"
    """`counter`: pure function of (seed, step, sample). `reference`: the reference's own random streams."""
    truncate: Literal["batch_min", "none"] = "batch_min"
    """`batch_min`: every clip of a truncation group keeps as many ids as the shortest, the reference's rule."""
    group_size: PositiveInt | None = None
    """Clips per truncation group; None: the configured batch size."""
    clips_per_mask: PositiveInt = 1
    """Clips that share their masks: 1, or data.clips_per_video, as in V-JEPA 1, where all clips of a video do."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"masks": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        others = sorted({spec.strategy for spec in self.masks} - {"multiblock"})
        if self.source == "reference" and others:
            raise ValueError(f"source reference draws multiblock masks only, but a mask has strategy {others[0]} (the "
                             "reference's tubes come from a stream that its loading processes share with cropping); "
                             "set source to counter")
        return self


class AugmentationConfig(Section):
    """Random resized crop and horizontal flip (reference: app/vjepa/transforms.py)."""

    random_resize_scale: Range = (0.3, 1.0)
    random_resize_aspect_ratio: Range = (0.75, 1.35)
    horizontal_flip: bool = True

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        for name, top in (("random_resize_scale", 1.0), ("random_resize_aspect_ratio", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} is [{low}, {high}]; expected 0 < low <= high <= {top:g}")
        return self


class DataConfig(Section):
    """Which clips, and how they are read."""

    datasets: Annotated[list[str], BeforeValidator(_as_list)] = []
    """One or several of: CSV, .npy, folder, glob, pack, or `synthetic:` for the clips that the demo makes itself,
    `physics:` for those of vjepa_fast.data.physics."""
    datasets_weights: list[float] | None = None
    dataset_fpcs: Annotated[list[PositiveInt], Field(min_length=1)] = [16]
    """Frames per clip, one entry a dataset; one entry serves all."""
    batch_size: PositiveInt | None = None
    """Clips per process and step. Set this or global_batch_size."""
    global_batch_size: PositiveInt | None = None
    """Clips per step over all processes: the run is then the same at any number of processes."""
    fps: float | None = None
    """Frames per second of a clip. At most one of fps, duration (seconds) and frame_step; none means fps 4."""
    duration: float | None = None
    frame_step: PositiveInt | None = None
    round_fps: bool = True
    """Round a video's frame rate up to a whole number before fps or duration is turned into frames, as V-JEPA 2 does;
    V-JEPA 1 does not."""
    clips_per_video: PositiveInt = 1
    """Clips of a step that come from one video, each with its own window, crop and flip: PyAV decodes the video once
    for all of them. The clips of a batch are then less diverse. Divides batch_size or global_batch_size."""
    split_videos: bool = False
    """Cut a video into clips_per_video parts of one length and take a clip from each, as V-JEPA 1 does; else every
    clip comes from anywhere in the video."""
    crop_size: Size = (256, 256)
    patch_size: PositiveInt = 16
    tubelet_size: PositiveInt = 2
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding processes per training process; None: by the cores there are."""
    prefetch: PositiveInt = 2
    """Batches each worker reads ahead."""
    backend: Literal["auto", "pyav", "dali"] = "auto"
    """What decodes: `auto` is DALI on a GPU where it is installed (the extra `dali`), else PyAV."""
    device_prefetch: PositiveInt | None = None
    """Batches that are copied or decoded ahead of the step on the device, with DALI each by a pipeline of its own.
    None: 4 with DALI on a GPU, 2 with PyAV on a GPU or DALI on the CPU. PyAV on the CPU has nothing to do ahead."""
    dali_threads: PositiveInt | None = None
    """Threads of each DALI pipeline; None: 8 on a GPU, where they wait for its decoders, else the cores there are."""
    pin_mem: bool = True
    filter_short_videos: bool = False
    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Stop when more than this fraction of the videos tried could not be read."""
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Taken from train.seed."""
    cache_dir: Path | None = None
    """Where keyframe indices are kept; None: $XDG_CACHE_HOME/vjepa_fast."""
    aug: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        given = [name for name in ("fps", "duration", "frame_step") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; keep one and set the other to null")
        for name in given:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not given:
            self.fps = 4
        if self.batch_size is not None and self.global_batch_size is not None:
            raise ValueError("batch_size (per process) and global_batch_size (all processes) are both set; "
                             "keep one and set the other to null")
        if self.batch_size is None and self.global_batch_size is None:
            self.batch_size = 24
        name = "global_batch_size" if self.batch_size is None else "batch_size"
        if getattr(self, name) % self.clips_per_video:
            raise ValueError(f"clips_per_video {self.clips_per_video} does not divide {name} {getattr(self, name)}; "
                             "set it to a divisor, so that the clips of a video are in one step")
        count = len(self.datasets)
        if count and len(self.dataset_fpcs) not in (1, count):
            raise ValueError(
                f"dataset_fpcs has {len(self.dataset_fpcs)} entries for {count} datasets; expected one for "
                "all or one a dataset")
        if count and len(self.dataset_fpcs) == 1:
            self.dataset_fpcs = self.dataset_fpcs * count
        if self.datasets_weights is not None:
            if len(self.datasets_weights) != count:
                raise ValueError(
                    f"datasets_weights has {len(self.datasets_weights)} entries for {count} datasets; expected one a "
                    "dataset, or null")
            if min(self.datasets_weights) < 0 or sum(self.datasets_weights) <= 0:
                raise ValueError(f"datasets_weights is {self.datasets_weights}; expected weights >= 0 with a sum > 0")
        for fpc in self.dataset_fpcs:
            if fpc != 1 and fpc % self.tubelet_size:
                raise ValueError(f"dataset_fpcs holds {fpc}, which tubelet_size {self.tubelet_size} does not divide")
        for side in self.crop_size:
            if side % self.patch_size:
                raise ValueError(f"crop_size {side} is not a multiple of patch_size {self.patch_size}")
        return self

    def per_process(self, world_size: int) -> int:
        """Clips per process and step."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.global_batch_size is not None
        if self.global_batch_size % world_size:
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} is not a multiple of {world_size} processes")
        return self.global_batch_size // world_size


class LossConfig(Section):
    loss_exp: Annotated[float, Field(gt=0)] = 1.0
    """p of mean |prediction - target|^p / p."""
    reg_coeff: NonNegative = 0.0
    """Weight of V-JEPA 1's variance term, the mean of relu(1 - standard deviation over a clip's predicted tokens)."""
    prediction_l2: NonNegative = 0.0
    """Weight of half the mean square of what the predictor predicts, an L2 penalty on its output. With loss_exp 2, half
    a mean squared error, both are halves. The predictor's weights have optimization.weight_decay."""
    predict_all: bool = False
    """V-JEPA 2.1's dense loss: context tokens are predicted too, by a head of their own, and their loss is added."""
    lambda_value_vid: NonNegative = 0.5
    """Weight of the context tokens' loss of videos; lambda_value_img: of images. Only with predict_all."""
    lambda_value_img: NonNegative = 0.5
    lambda_progressive: bool = True
    """Both weights are 0 up to the first of lambda_warmup and grow linearly up to the second."""
    lambda_warmup: tuple[Annotated[int, Field(ge=0)], PositiveInt] = (15_000, 30_000)
    """Steps; constants in the reference."""
    weight_distance_loss: bool = False
    """A context token weighs 1 / sqrt(its distance, in tokens, to the nearest predicted one)."""
    offset_context_loss: bool = False
    """These distances are divided by (tokens of a row) // 16."""

    def model_options(self) -> dict[str, Any]:
        """What vjepa_fast.VJEPA takes of it: `vf.VJEPA(cfg.model, **cfg.loss.model_options())`."""
        return {
            "loss_exp": self.loss_exp, "reg_coeff": self.reg_coeff, "prediction_l2": self.prediction_l2,
            "weight_distance_loss": self.weight_distance_loss, "offset_context_loss": self.offset_context_loss,
            "context_scale": (self.lambda_value_vid, self.lambda_value_img),
        }

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.lambda_warmup[0] >= self.lambda_warmup[1]:
            raise ValueError(f"lambda_warmup is {list(self.lambda_warmup)}; expected two steps, the first below the "
                             "second")
        if not self.predict_all and (self.weight_distance_loss or self.offset_context_loss):
            raise ValueError("weight_distance_loss and offset_context_loss weigh the loss of context tokens, which "
                             "predict_all=true adds")
        if self.offset_context_loss and not self.weight_distance_loss:
            raise ValueError("offset_context_loss is about distances, which weight_distance_loss=true takes into "
                             "account")
        return self


class OptimizationConfig(Section):
    """AdamW and its schedules. Epochs are units of `ipe` steps."""

    epochs: PositiveInt = 10
    ipe: PositiveInt | None = 300
    """Steps per epoch; None: as many as the data gives (the reference's default)."""
    ipe_scale: Annotated[float, Field(gt=0)] = 1.25
    """The schedules run over ipe_scale * epochs * ipe steps and are cut at the end of training."""
    schedule: Literal["warmup_cosine", "linear", "wsd"] = "warmup_cosine"
    warmup: NonNegative = 40
    """Epochs."""
    anneal: NonNegative = 0
    """Epochs of linear decay at the end of a `wsd` schedule."""
    start_lr: NonNegative = 1e-4
    lr: NonNegative = 5.25e-4
    final_lr: NonNegative = 5.25e-4
    weight_decay: NonNegative = 0.04
    final_weight_decay: NonNegative = 0.04
    ema: Range = (0.99925, 0.99925)
    """Momentum of the target encoder at the first and at the last step."""
    betas: Range = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    anneal_ckpt: Path | None = None
    """Start from these weights and this optimizer state at step 0 (cooldown)."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the encoder's gradients and of the predictor's, each by itself, from the second epoch after the
    warm-up on, as in V-JEPA 1; None: any."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches per step; the batch size is that of the whole step."""
    loss_reg_std_mult: Annotated[float, Field(gt=0)] | None = None
    """Skip a step whose loss exceeds mean + so many standard deviations of the last losses. None: skip none."""
    loss_reg_num_tracking_steps: PositiveInt = 300
    """How many last losses; half of them must be there before a step is skipped."""
    loss_reg_min_epoch: Annotated[int, Field(ge=0)] = 50
    """No step is skipped up to this epoch, counted from 0."""

    @model_validator(mode="after")
    def _check(self) -> OptimizationConfig:
        for value in self.ema:
            if not 0 <= value <= 1:
                raise ValueError(f"ema is {list(self.ema)}; expected two momenta in [0, 1]")
        for value in self.betas:
            if not 0 <= value < 1:
                raise ValueError(f"betas is {list(self.betas)}; expected two numbers in [0, 1)")
        if self.schedule == "wsd" and self.warmup + self.anneal > self.ipe_scale * self.epochs:
            raise ValueError(f"warmup {self.warmup:g} + anneal {self.anneal:g} epochs do not fit the "
                             f"{self.ipe_scale * self.epochs:g} epochs (ipe_scale * epochs) of the wsd schedule")
        return self

    @property
    def num_steps(self) -> int:
        assert self.ipe is not None, "the trainer sets ipe from the length of the data"
        return self.epochs * self.ipe


class ImageDataConfig(Section):
    """Images to train on together with videos (V-JEPA 2.1). What is not here is as in `data`."""

    datasets: Annotated[list[str], BeforeValidator(_as_list)] = []
    """As data.datasets; a video stands for one of its frames."""
    datasets_weights: list[float] | None = None
    batch_size: PositiveInt = 72
    """Images of a step: so many times rank_ratio for each process."""
    rank_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the loss that images have. In the reference it is the share of the processes that train on images."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding processes per training process; None: as data.num_workers."""

    @property
    def per_process(self) -> int:
        """Images of one process in a step."""
        return int(self.batch_size * self.rank_ratio)


class TrainConfig(Section):
    """The run itself."""

    out: Path | None = None
    """Run folder; None: runs/<name>."""
    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 239
    dtype: Dtype = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graphs: Switch = "auto"
    """Capture forward, backward and update as CUDA graphs and replay them, where the run allows. `auto`: if that is
    faster in a few steps at the beginning; on a CPU never."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp`, each has the whole model and gradients are averaged; `fsdp`, each keeps a shard of
    every parameter, of the target encoder's too, and of the optimizer's state (FSDP2, ZeRO stage 3)."""
    shard_optimizer: bool = False
    """With several processes, each updates its share of the parameters only, and keeps the optimizer's moments of it
    (ZeRO stage 1). Not with dtype float16."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are averaged over several processes. bfloat16: half of the bytes, and a rounding of each
    gradient to 8 bits before and in every sum."""
    max_steps: Annotated[int, Field(ge=0)] | None = None
    """Stop after this many steps; the schedules keep their length."""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt | None = None
    """Steps between writes of latest.pt; None: every epoch."""
    keep_last: PositiveInt = 2
    """How many of the last checkpoints stay: latest.pt, and before it step<N>.pt, from which a run goes on if latest.pt
    turns out to be damaged."""
    async_checkpoint: bool = False
    """Copy what a checkpoint holds to the host's memory, and write it from there while training goes on."""
    checkpoint_format: Literal["meta", "sharded"] | None = None
    """`meta`: one file in the reference's layout, latest.pt; `sharded`: step<N>.dcp folders, to which every process
    writes its part. None: sharded with parallel=fsdp, else meta."""
    save_every_freq: int = -1
    """Epochs between the checkpoints that are kept for good as e<epoch>.pt; -1: none."""
    auto_resume: bool = False
    """Continue from latest.pt when the run folder has one, as the reference does with load_checkpoint."""
    read_checkpoint: Path | None = None
    """Continue from this checkpoint of ours or of the reference."""
    init_weights: Path | None = None
    """Start at step 0 from these weights with a new optimizer: whatever `vjepa_fast.load` opens, such as released
    weights. A run that is resumed goes on from its own checkpoint."""
    init_predictor: bool = True
    """Take the predictor of init_weights too; false: a new one, as for files that have none or a distilled model's."""
    needs_weights: bool = False
    """Refuse to train without weights to start from; set in recipes that make no sense without."""
    rollback_after: PositiveInt = 20
    """Bad steps in a row (gradients that are not finite, losses above spike_factor) after which weights, optimizer and
    target encoder go back to the last checkpoint; the data goes on behind the bad steps."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """How often a run goes back before it gives up."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above this many times the mean of those before makes a step bad; None: a finite loss never does."""
    watchdog: PositiveFloat | None = None
    """Seconds without progress after which a run says where each process is, and ends; None: it waits for ever."""
    connect_timeout: PositiveFloat = 300.0
    """Seconds that the processes of torchrun or srun wait for each other at the start."""
    tensorboard: bool = False
    probe: Switch = False
    """At the end, fit linear probes on the labels of the synthetic clips (the demo); `auto`: where there are such."""


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
                self.model.return_all_tokens != self.loss.predict_all):
            raise ValueError(f"model.return_all_tokens is {str(self.model.return_all_tokens).lower()} but "
                             f"loss.predict_all is {str(self.loss.predict_all).lower()}; set it in loss only")
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
            raise ValueError("train.shard_optimizer has no part in the loss scale of train.dtype=float16; set "
                             "train.dtype=bfloat16, or train.shard_optimizer=false")
        if self.mask.clips_per_mask not in (1, self.data.clips_per_video):
            raise ValueError(f"mask.clips_per_mask is {self.mask.clips_per_mask}, but data.clips_per_video is "
                             f"{self.data.clips_per_video}; expected that number, or 1 for masks of its own for every "
                             "clip")
        if self.mask.group_size is None:
            self.mask.group_size = self.data.batch_size or self.data.global_batch_size
        return self

    @property
    def _start(self) -> dict[str, Path]:
        """What a run starts from, by key."""
        keys = {"train.init_weights": self.train.init_weights, "train.read_checkpoint": self.train.read_checkpoint,
                "optimization.anneal_ckpt": self.optimization.anneal_ckpt}
        return {key: path for key, path in keys.items() if path is not None}

    def _check_start(self) -> None:
        others = [key for key in self._start if key != "train.init_weights"]
        if self.train.init_weights is not None and others:
            raise ValueError(f"train.init_weights and {others[0]} are both set, and a run starts from one of them; set "
                             f"{others[0]}=null for the weights alone, with a new optimizer")

    def _check_images(self) -> None:
        if self.img_data is None:
            if self.img_mask is not None:
                raise ValueError("img_mask is set but img_data is not; say in img_data what images to train on, or set "
                                 "img_mask to null too")
            return
        if self.model.img_temporal_dim_size is None:
            raise ValueError("img_data needs a model that takes images beside videos; set model.img_temporal_dim_size "
                             "to 1")
        share = self.img_data.batch_size * self.img_data.rank_ratio
        if share != int(share) or share < 1:
            raise ValueError(f"img_data.batch_size {self.img_data.batch_size} times rank_ratio "
                             f"{self.img_data.rank_ratio:g} is {share:g} images for each process; expected a whole "
                             "number, at least 1")

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
            raise ConfigError("train.init_weights is not set, and this config goes on from a trained model; say from "
                              "which, as in train.init_weights=vitl.pt: Meta's ViT-L is at "
                              "https://dl.fbaipublicfiles.com/vjepa2/vitl.pt, the README of facebookresearch/vjepa2 "
                              "lists the others")
        if not self.data.datasets:
            raise ConfigError("data.datasets is empty; say what to train on: a CSV of `path label` lines, a folder of "
                              "videos, an .npy or a glob, as in data.datasets=[train_paths.csv]")
        if self.model.teacher_embed_dim is not None:
            raise ConfigError(f"model.teacher_embed_dim is {self.model.teacher_embed_dim}: this model predicts the "
                              "features of another one, which it was distilled from, and cannot be trained here; set "
                              "it to null to train a model of its own")
        if self.img_data is not None and not self.img_data.datasets:
            raise ConfigError("img_data.datasets is empty; say what images to train on: a CSV of their paths or a "
                              "folder, as in img_data.datasets=[images.csv], or train on videos alone with "
                              "img_data=null img_mask=null")
        if self.train.parallel == "fsdp":
            self._check_sharded()

    def _check_sharded(self) -> None:
        """Raises ConfigError where something does not go with train.parallel=fsdp."""
        lengths = sorted(set(self.data.dataset_fpcs))
        refused = {
            "train.shard_optimizer is set, but the optimizer's state is sharded with the parameters": (
                self.train.shard_optimizer, "leave it out"),
            "train.dtype is float16, whose loss scale each process would choose for itself": (
                self.train.dtype == "float16", "set train.dtype=bfloat16"),
            "model.target_precision is float8, whose copies of weights are made of whole parameters": (
                self.model.target_precision == "float8", "leave it out"),
            f"data.dataset_fpcs has clips of {lengths} frames, and a process may get none of one length": (
                len(lengths) > 1, "train on clips of one length"),
        }
        for what, (is_so, advice) in refused.items():
            if is_so:
                raise ConfigError(f"train.parallel is fsdp and {what}; {advice}, or set train.parallel=ddp")
