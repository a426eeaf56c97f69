"""Small models of each kind, and their weights laid out as files lay them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vjepa_fast as vf
from vjepa_fast.checkpoints import meta_format
from vjepa_fast.config.schema import Config
from vjepa_fast.models.attentive import AttentiveClassifier

WIDTH, HEADS, FRAMES, CROP = 96, 3, 8, 64
MODEL = {
    "model_name": "vit_tiny",
    "embed_dim": WIDTH,
    "depth": 3,
    "num_heads": HEADS,
    "pred_embed_dim": 48,
    "pred_depth": 2,
    "pred_num_heads": 3,
    "zero_init_mask_tokens": False,
    "num_mask_tokens": 2,
}
DATA = {"crop_size": CROP, "patch_size": 16, "dataset_fpcs": [FRAMES], "fps": 8}
NOT_IN_SHAPES = {"num_heads": HEADS, "pred_num_heads": 3}


def config(**changes: Any) -> Config:
    return Config.model_validate({"model": {**MODEL, **changes}, "data": DATA})


def model(**changes: Any) -> vf.VJEPA:
    """With weights that differ between student and teacher, and mask tokens that are not zero."""
    torch.manual_seed(0)
    made = vf.VJEPA.from_config(config(**changes))
    with torch.no_grad():
        for parameter in made.target_encoder.parameters():
            parameter.add_(0.01)
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for part in (made.encoder, made.target_encoder, made.predictor):
            for name in ("pos_embed", "predictor_pos_embed"):
                if getattr(part, name, None) is not None:
                    getattr(part, name).copy_(
                        getattr(
                            vf.VJEPA(made.cfg).encoder if name == "pos_embed" else vf.VJEPA(made.cfg).predictor, name
                        )
                    )
    return made.eval()


def prefixed(state: dict[str, Tensor], prefix: str = meta_format.PREFIX) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def contents(made: vf.VJEPA, prefix: str = meta_format.PREFIX) -> dict[str, Any]:
    """A training checkpoint of the reference."""
    return {
        **{name: prefixed(getattr(made, name).state_dict(), prefix) for name in meta_format.NETWORKS},
        "opt": {"state": {}, "param_groups": []},
        "scaler": None,
        "epoch": 3,
        "loss": 0.5,
        "batch_size": 2,
        "world_size": 1,
        "lr": 1e-3,
    }


def write_run(folder: Path) -> Path:
    """The folder, with a checkpoint whose config says 8 frames at 8 frames a second, 64 px."""
    own = {"vjepa_fast": {"config": config().model_dump(mode="json")}}
    torch.save(contents(model()) | own, folder / "latest.pt")
    return folder


def probe(num_classes: int = 5, depth: int = 4) -> AttentiveClassifier:
    torch.manual_seed(1)
    made = AttentiveClassifier(WIDTH, HEADS, num_classes, depth)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (1 if parameter.ndim == 1 else 0))
    return made.eval()


def clips(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, shape or (2, FRAMES, CROP, CROP, 3), dtype=torch.uint8, generator=generator)
