"""Sections `model` and `loss`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vjepa_fast.config.sections.base import Checkpointing, Dtype, NonNegative, PositiveInt, Section, Size, Switch

MODEL_NAMES = (
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "vit_giant",
    "vit_giant_xformers",
    "vit_gigantic",
    "vit_gigantic_xformers",
)
"""Each may end in `_rope`."""


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
    """Positions of a model without RoPE: fixed sines and cosines, or trained vectors. The encoder adds one vector for
    the frame of tokens and one for the place in it; the predictor has one for each token of a clip."""
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
            raise ValueError(
                f"model_name is {self.model_name!r}; did you mean {nearest}? "
                f"Known: {', '.join(MODEL_NAMES)}, each also with _rope at the end"
            )
        if self.positions == "learned" and (self.use_rope or self.model_name.endswith("_rope")):
            raise ValueError("positions is learned, but RoPE is on, which takes their place; set use_rope to false")
        if self.modality_embedding and self.img_temporal_dim_size is None:
            raise ValueError(
                "modality_embedding tells videos from images, of which there are none; set img_temporal_dim_size to 1"
            )
        if self.return_all_tokens and self.n_output_distillation is None:
            raise ValueError(
                "return_all_tokens (from loss.predict_all) is of V-JEPA 2.1; set n_output_distillation to 4 as well"
            )
        if self.n_output_distillation is not None and not (self.use_rope or self.model_name.endswith("_rope")):
            raise ValueError(
                "n_output_distillation is of V-JEPA 2.1, which has rotary positions only; set use_rope to true"
            )
        if self.n_output_distillation is not None and not self.use_mask_tokens:
            raise ValueError(
                "n_output_distillation is of V-JEPA 2.1, whose predictor starts from mask tokens; set "
                "use_mask_tokens to true"
            )
        if self.objective == "pixels" and (
            self.n_output_distillation is not None or not self.use_mask_tokens or self.img_temporal_dim_size is not None
        ):
            raise ValueError(
                "objective is pixels, a baseline for videos with mask tokens; set n_output_distillation "
                "and img_temporal_dim_size to null and use_mask_tokens to true, or objective to latent"
            )
        if self.teacher_embed_dim is not None and self.n_output_distillation is None:
            raise ValueError("teacher_embed_dim is of V-JEPA 2.1; set n_output_distillation as well")
        return self


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
        """What vjepa_fast.VJEPA takes of it; `vf.VJEPA.from_config(cfg)` passes it on."""
        return {
            "loss_exp": self.loss_exp,
            "reg_coeff": self.reg_coeff,
            "prediction_l2": self.prediction_l2,
            "weight_distance_loss": self.weight_distance_loss,
            "offset_context_loss": self.offset_context_loss,
            "context_scale": (self.lambda_value_vid, self.lambda_value_img),
        }

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.lambda_warmup[0] >= self.lambda_warmup[1]:
            raise ValueError(
                f"lambda_warmup is {list(self.lambda_warmup)}; expected two steps, the first below the second"
            )
        if not self.predict_all and (self.weight_distance_loss or self.offset_context_loss):
            raise ValueError(
                "weight_distance_loss and offset_context_loss weigh the loss of context tokens, which "
                "predict_all=true adds"
            )
        if self.offset_context_loss and not self.weight_distance_loss:
            raise ValueError(
                "offset_context_loss is about distances, which weight_distance_loss=true takes into account"
            )
        return self
