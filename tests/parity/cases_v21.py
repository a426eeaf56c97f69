"""The runs of V-JEPA 2.1 that are compared: videos, images and both; three steps see three parts of the lambda ramp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases import Case

IMAGE_SHARE = 0.5
LAMBDA = 0.5
RAMP = (0, 2)
"""The weight of the context loss is 0 at the first step, LAMBDA / 2 at the second, LAMBDA at the third."""


@dataclass(frozen=True)
class DenseCase(Case):
    """Twelve blocks, the fewest that the reference's encoder takes; 4 x 4 patches, whose positions spread exactly."""

    patch_size: int = 16
    crop_size: int = 64
    batch_size: int = 2
    depth: int = 12
    embed_dim: int = 32
    num_heads: int = 2
    pred_depth: int = 4
    weight_distance_loss: bool = True
    offset_context_loss: bool = False

    @property
    def num_mask_tokens(self) -> int:
        return self.num_masks

    @property
    def has_images(self) -> bool:
        return 1 in self.frames

    def grid(self, frames: int) -> tuple[int, int, int]:
        side = self.crop_size // self.patch_size
        return max(1, frames // self.tubelet_size), side, side

    def config(self, dtype: str = "float32") -> dict[str, Any]:
        config = super().config(dtype)
        config["model"] |= {
            "rope_style": "interleaved",
            "n_output_distillation": 4,
            "img_temporal_dim_size": 1,
            "modality_embedding": True,
            "interpolate_rope": True,
            "num_mask_tokens": self.num_mask_tokens,
        }
        # Sizes of an image model come from no clip: the videos of the reference's model are 8 frames long.
        config["data"]["dataset_fpcs"] = [8]
        config["loss"] |= {
            "predict_all": True,
            "weight_distance_loss": self.weight_distance_loss,
            "lambda_warmup": RAMP,
            "offset_context_loss": self.offset_context_loss,
            "lambda_value_vid": LAMBDA,
            "lambda_value_img": LAMBDA,
        }
        return config


DENSE_CASES = {
    case.name: case
    for case in (
        DenseCase("dense_video"),
        DenseCase("dense_video_equal", weight_distance_loss=False),
        DenseCase("dense_image", frames=(1,)),
        DenseCase("dense_both", frames=(8, 1), seed=1),
        DenseCase("dense_both_equal_mse", frames=(8, 1), weight_distance_loss=False, loss_exp=2.0),
        DenseCase("dense_swiglu", use_silu=True, use_pred_silu=True),
    )
}

GOLDEN_CASES = ("dense_both",)
"""Those whose numbers are kept: both kinds of batches, with distances, at all parts of the ramp."""
