"""V-JEPA 2's initialisation and its family of sizes beside ours."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.config.schema import Config

from . import ours, reference_v2
from .cases import Case
from .reference import ignore_sdp_warning

pytestmark = [reference_v2.needs_reference, ignore_sdp_warning]


def without_outliers(value: torch.Tensor) -> torch.Tensor:
    """Drop what lies beyond ten medians.

    One in 2**24 of the reference's fp32 draws is the -1 whose inverse error function is -inf, and is cut to -100
    standard deviations; one such weight shifts the spread of a tensor by percents.
    """
    return value[value.abs() <= 10 * value.abs().median()]


@pytest.mark.parametrize("zero_init_mask_tokens", [True, False])
@pytest.mark.parametrize("silu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("use_rope", [True, False], ids=["rope", "sincos"])
def test_initialisation(use_rope: bool, silu: bool, zero_init_mask_tokens: bool) -> None:
    """Same constants, position tables to the bit, and the same spread of every random tensor."""
    case = Case(
        "init",
        use_rope=use_rope,
        use_silu=silu,
        use_pred_silu=silu,
        embed_dim=192,
        pred_embed_dim=96,
        depth=3,
        pred_depth=2,
        num_heads=6,
        pred_num_heads=3,
    )
    torch.manual_seed(1)
    theirs = reference_v2.build(case, zero_init_mask_tokens=zero_init_mask_tokens).weights()
    options = case.config()
    options["model"]["zero_init_mask_tokens"] = zero_init_mask_tokens
    torch.manual_seed(2)
    mine = ours.weights_of(vf.VJEPA.from_config(Config.model_validate(options)))
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = mine[name]
        if name.endswith("pos_embed") or bool((expected == expected.flatten()[0]).all()):
            assert torch.equal(found, expected), name
            continue
        expected = without_outliers(expected)
        # Five standard errors of the difference between two estimates of a standard deviation.
        tolerance = 5 / math.sqrt(expected.numel())
        assert found.std().item() == pytest.approx(expected.std().item(), rel=tolerance), name
        assert abs(found.mean().item()) <= tolerance * expected.std().item(), name
        kurtosis = [((x - x.mean()) ** 4).mean().item() / x.var().item() ** 2 for x in (found, expected)]
        if expected.numel() > 5000:
            assert kurtosis[0] == pytest.approx(kurtosis[1], abs=0.35), name
    for key, value in mine.items():
        if key.startswith("encoder."):
            assert torch.equal(mine[f"target_{key}"], value), key


def family() -> list[str]:
    """Names of the reference's sizes, without the one of width 1 that it keeps for timing."""
    vit = reference_v2.modules().vit
    return sorted(
        name
        for name, value in vars(vit).items()
        if name.startswith("vit_") and inspect.isfunction(value) and name != "vit_synthetic"
    )


def test_every_size_has_the_same_parameters() -> None:
    """Names and shapes of encoder and predictor, and head counts, of the whole family."""
    assert len(family()) >= 13
    for name in family():
        rope = name.endswith("_rope")
        with reference_v2.on_meta_device():
            # A `_rope` name sets the flag itself and fails when it is given, so the flag alone is used.
            encoder, predictor = reference_v2.modules().utils.init_video_model(
                device="meta",
                patch_size=16,
                max_num_frames=4,
                tubelet_size=2,
                model_name=name.removesuffix("_rope"),
                crop_size=32,
                pred_depth=12,
                pred_num_heads=12,
                pred_embed_dim=384,
                use_mask_tokens=True,
                num_mask_tokens=2,
                use_sdpa=True,
                use_rope=rope,
                wide_silu=True,
            )
        cfg = Config.model_validate(
            {
                "model": {"model_name": name, "use_rope": rope, "pred_num_heads": 12},
                "data": {"crop_size": 32, "dataset_fpcs": [4]},
            }
        )
        with torch.device("meta"):
            model = vf.VJEPA.from_config(cfg)
        for own, reference in ((model.encoder, encoder), (model.predictor, predictor)):
            found = {key: tuple(value.shape) for key, value in own.state_dict().items()}
            expected = {key: tuple(value.shape) for key, value in reference.backbone.state_dict().items()}
            assert found == expected, name
        heads = [model.encoder.blocks[0].attn.num_heads, model.predictor.predictor_blocks[0].attn.num_heads]
        assert heads == [encoder.backbone.num_heads, predictor.backbone.predictor_blocks[0].attn.num_heads], name
