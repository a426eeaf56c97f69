"""Forward passes of the reference's modules that training at one size does not reach: other inputs, other outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.config.schema import Config
from vjepa_fast.models.vit import VisionTransformer

from . import reference_v2
from .cases import CASES, Case, recipe_weights, relative_difference, uniform
from .reference import ignore_sdp_warning

pytestmark = [reference_v2.needs_reference, ignore_sdp_warning]

CropSize = int | tuple[int, int]

# Trained crop size and frames, and the shape of the input.
SIZES: dict[str, tuple[CropSize, int, tuple[int, ...]]] = {
    "as_trained": (32, 8, (8, 32, 32)),
    "fewer_frames": (32, 8, (4, 32, 32)),
    "more_frames": (32, 8, (12, 32, 32)),
    "other_shape": (32, 8, (8, 48, 24)),
    "trained_non_square": ((16, 32), 8, (8, 16, 32)),
    "image": (32, 1, (32, 32)),
    "larger_image": (32, 1, (64, 64)),
}


def encoders(case: Case, crop_size: CropSize, num_frames: int, out_layers: list[int] | None = None) -> tuple[Any, Any]:
    """The reference's encoder and ours with the same random weights, in fp64."""
    theirs = reference_v2.build_encoder(case, img_size=crop_size, num_frames=num_frames, out_layers=out_layers)
    theirs = theirs.double()
    options = case.config()
    options["data"] |= {"crop_size": crop_size, "dataset_fpcs": [num_frames]}
    ours = VisionTransformer(Config.model_validate(options).model, out_layers=out_layers).double()
    state = theirs.state_dict()
    state |= recipe_weights({name: tuple(value.shape) for name, value in state.items()}, 6)
    for model in (theirs, ours):
        model.load_state_dict(state, strict=True)
    return theirs, ours


@pytest.mark.parametrize(
    ("name", "crop_size", "num_frames", "shape"),
    [
        pytest.param(name, *size, id=f"{name}-{label}")
        for name in ("rope", "sincos")
        for label, size in SIZES.items()
        # The reference's sine-cosine tables are square.
        if not (name == "sincos" and label == "trained_non_square")
    ],
)
def test_encoder(name: str, crop_size: CropSize, num_frames: int, shape: tuple[int, ...]) -> None:
    theirs, ours = encoders(CASES[name], crop_size, num_frames)
    x = uniform(f"forward/{shape}", (2, 3, *shape))
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
        assert relative_difference(found, expected) <= 1e-12
        ids = torch.stack([torch.randperm(expected.shape[1])[:5].sort().values for _ in range(2)])
        for masks in (ids, [ids, ids.flip(0)]):
            assert relative_difference(ours(x, masks=masks), theirs(x, masks=masks)) <= 1e-12


def test_out_layers() -> None:
    theirs, ours = encoders(CASES["rope"], 32, 8, [0, 1])
    x = uniform("out_layers", (2, 3, 8, 32, 32))
    with torch.no_grad():
        for found, expected in zip(ours(x), theirs(x), strict=True):
            assert relative_difference(found, expected) <= 1e-12


@pytest.mark.parametrize("name", ["rope", "sincos"])
def test_predictor_with_index_lists(name: str) -> None:
    """The dense call, with every mask token; the index counts modulo their number."""
    case = CASES[name]
    theirs = reference_v2.build(case, torch.float64).predictor.backbone
    ours = vf.VJEPA.from_config(Config.model_validate(case.config())).double().predictor
    state = theirs.state_dict()
    state |= recipe_weights({key: tuple(value.shape) for key, value in state.items()}, 7)
    for model in (theirs, ours):
        model.load_state_dict(state, strict=True)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    context, target = order[:, :20], order[:, 20:50]
    x = uniform("context", (2, 20, case.embed_dim))
    with torch.no_grad():
        for index in range(3):
            expected = theirs(x, context, target, mask_index=index)
            assert relative_difference(ours(x, context, target, mask_index=index), expected) <= 1e-12
        assert relative_difference(ours(x, context, target), theirs(x, context, target)) <= 1e-12
