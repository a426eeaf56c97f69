"""The count of a step's operations against torch's own, and against an independent count for ViT-L."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import vjepa_fast as vf
from tests.helpers.flops import CountFlops
from vjepa_fast.bench.workload import LARGE
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.flops import step_flops
from vjepa_fast.masking.batch import MaskBatch


def config(**model: Any) -> Config:
    return Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 48,
                "depth": 2,
                "num_heads": 3,
                "pred_depth": 3,
                "pred_embed_dim": 32,
                "pred_num_heads": 2,
                **model,
            },
            "data": {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [8], "batch_size": 3},
            "loss": {"predict_all": model.get("return_all_tokens", False)},
        }
    )


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"use_silu": True},
        {"use_silu": True, "use_pred_silu": True, "wide_silu": False},
        {"use_rope": False, "mlp_ratio": 48 / 11},
        {"depth": 4, "n_output_distillation": 4, "return_all_tokens": True},
        {"depth": 4, "n_output_distillation": 1},
    ],
)
def test_equals_what_torch_counts(model: dict[str, Any]) -> None:
    cfg = config(**model)
    masks = vf.MaskSampler(cfg.mask, (4, 4, 4), seed=1)(0, np.arange(3))
    clips = torch.randint(256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    net = vf.VJEPA.from_config(cfg)
    # torch counts the plain form of attention exactly: two products forward, four backward.
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as counter:
        net(clips, masks).loss.backward()
    assert step_flops(cfg.model, masks).total == counter.total


def test_vit_large() -> None:
    """ViT-L at 256 px, 2048 tokens, 506 + 130 context and 966 + 1439 target tokens (GFLOP)."""
    lengths = ((506, 130), (966, 1439))
    ids = [torch.zeros(sum(pair), dtype=torch.int32) for pair in lengths]
    masks = MaskBatch(LARGE.grid, 2, 1, *ids, *lengths)
    found = step_flops(LARGE.config.model, masks)
    assert found.target_encoder / 1e9 == pytest.approx(1649.3 + 6.4, rel=1e-3)
    assert found.context_encoder / 1e9 == pytest.approx(1235.5 + 4.0, rel=1e-2)
    assert found.predictor / 1e9 == pytest.approx(651.5, rel=1e-2)
