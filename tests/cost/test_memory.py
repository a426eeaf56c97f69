"""Predicted memory: beside what the allocator counts on a CPU, and beside the tensors of a step on our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.plan_memory import config, measure, predict
from tests.cost.live_bytes import LiveBytes
from vjepa_fast.config import load_recipe, recipe_names
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.advice import FITS, Adviser
from vjepa_fast.cost.counter import fake_parameters, fake_tensors
from vjepa_fast.cost.gpus import GPUS
from vjepa_fast.cost.loads import Loads, image_groups
from vjepa_fast.cost.memory import clip_bytes, estimate_memory, peak_memory
from vjepa_fast.cost.operations import step_operations
from vjepa_fast.cost.plan import describe, draw_masks
from vjepa_fast.cost.prediction import predict as predict_time
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.train.step import TrainStep

SMALL = {"depth": 3, "pred_depth": 3}


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "num_micro"),
    [("float32", "none", 1), ("bfloat16", "selective", 1), ("float32", "full", 2)],
)
def test_what_the_allocator_counts(dtype: str, checkpointing: str, num_micro: int) -> None:
    cfg = config("vit_tiny", 64, 4, dtype, checkpointing, num_micro, **SMALL)
    assert predict(cfg, 2).peak == pytest.approx(measure(cfg, 2), rel=0.1)


def traced(cfg: Config, masks: Sequence[MaskBatch]) -> int:
    """Bytes of the tensors alive at the peak of the second step, on our kernels, without arithmetic."""
    for batch in masks:
        _ = batch.context_rows, batch.target_rows, batch.cu_seqlens
    with torch.device("meta"):
        model = VJEPA.from_config(cfg)
    with fake_tensors(kernels=True):
        fake_parameters(model)
        step = TrainStep(model, cfg)
        frames = [1 if image else 16 for image in (*image_groups(cfg), False)]
        with LiveBytes() as live:
            for parameter in model.parameters():
                live.see(parameter)
            clips = [
                torch.empty((b.batch_size, num_frames, *cfg.data.crop_size, 3), dtype=torch.uint8)
                for b, num_frames in zip(masks, frames, strict=False)
            ]
            result = step(0, clips, masks)
            live.most = 0
            result = step(1, clips, masks)
    assert result.loss is not None
    return live.most


DENSE = {"n_output_distillation": 4, "img_temporal_dim_size": 1, "modality_embedding": True, "interpolate_rope": True}


@pytest.mark.parametrize(
    ("changes", "dtype", "checkpointing", "num_micro"),
    [
        ({"use_silu": True, "use_pred_silu": True}, "bfloat16", "none", 1),
        ({}, "float32", "selective", 1),
        ({}, "bfloat16", "full", 2),
        (DENSE, "bfloat16", "none", 1),
    ],
)
def test_tensors_on_our_kernels(changes: dict[str, Any], dtype: str, checkpointing: str, num_micro: int) -> None:
    cfg = config("vit_tiny", 64, 8, dtype, checkpointing, num_micro, depth=4, pred_depth=2, **changes)
    if changes is DENSE:
        raw = cfg.model_dump(exclude={"model": {"return_all_tokens"}})
        cfg = Config.model_validate(
            raw | {"loss": {"predict_all": True}, "img_data": {"batch_size": 16, "rank_ratio": 0.25}}
        )
    [masks] = draw_masks(cfg, 8, 1)
    loads = Loads.of([masks], image_groups(cfg))
    # Nothing is read ahead here.
    found = estimate_memory(cfg, loads).peak - 4 * clip_bytes(cfg, loads)
    assert found == pytest.approx(traced(cfg, masks), rel=0.1)


def test_images_have_one_frame() -> None:
    cfg = load_recipe("vitb16-256-v2.1")
    loads = Loads.of(draw_masks(cfg, 48, 1), image_groups(cfg))
    assert cfg.img_data is not None
    images = cfg.img_data.per_process
    assert loads.image_tokens == images * 256 and 0 < loads.image_context < loads.image_tokens
    assert clip_bytes(cfg, loads) == 256 * 256 * 3 * (48 * 16 + images)
    # A multiply-add as two; a token of a video has twice the pixels.
    embedded = sum(op.flops for op in step_operations(cfg, loads) if op.part == "patch embedding")
    tokens = 2 * (loads.whole.tokens + loads.context.tokens) - loads.image_tokens - loads.image_context
    assert embedded == 2 * 3 * 16**2 * 768 * tokens


def test_shares_of_processes() -> None:
    cfg = load_recipe("vitb16-256-v2.1")
    steps = draw_masks(cfg, 8, 2)
    alone, many = (peak_memory(cfg, steps, num_processes=count) for count in (1, 8))
    # Buckets are there all the time.
    assert many.peak > alone.peak and many.permanent == alone.permanent
    cfg.train.shard_optimizer = True
    shared = peak_memory(cfg, steps, num_processes=8)
    assert shared.optimizer_state == alone.optimizer_state / 8 and shared.peak < many.peak
    cfg.train.shard_optimizer, cfg.train.parallel = False, "fsdp"
    cut = peak_memory(cfg, steps, num_processes=8)
    assert cut.parameters == alone.parameters / 8 and cut.permanent < shared.permanent and cut.peak < shared.peak


def test_advice() -> None:
    cfg = load_recipe("vitl16-256", ["model.use_activation_checkpointing=false", "train.dtype=float32"])
    adviser = Adviser(cfg, draw_masks(cfg, 24, 2), num_processes=2)
    now = adviser.peak(cfg)
    single = {change.settings[0]: change.peak for change in adviser.single()}
    assert list(single) == [
        "train.dtype=bfloat16",
        "train.shard_optimizer=true",
        "train.parallel=fsdp",
        "model.activation_checkpointing=selective",
        "model.activation_checkpointing=full",
        "optimization.grad_accumulation=2",
    ]
    assert max(single.values()) < now
    [*_, micro] = adviser.what_fits(single["optimization.grad_accumulation=2"] * 0.9)
    assert micro.settings == ("optimization.grad_accumulation=4",)
    limit = adviser.least().peak * 1.1
    [combined] = adviser.what_fits(limit)
    assert len(combined.settings) > 1 and combined.peak <= limit < min(single.values())
    assert adviser.what_fits(1.0) == []


@pytest.mark.parametrize(
    ("changes", "card", "num_micro"), [(["model.model_name=vit_base"], "rtx4080", 2), ([], "rtx4090", 4)]
)
def test_flags_for_small_cards(changes: list[str], card: str, num_micro: int) -> None:
    """As docs/small_cards.md has them: without micro-batches it does not fit."""
    limit = FITS * GPUS[card].memory_bytes
    for count, fits in ((1, False), (num_micro, True)):
        cfg = load_recipe(
            "vitl16-256", [*changes, "model.activation_checkpointing=none", f"optimization.grad_accumulation={count}"]
        )
        assert (peak_memory(cfg, draw_masks(cfg, 24, 20)).peak <= limit) == fits


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_on_every_card(recipe: str) -> None:
    cfg = load_recipe(recipe)
    steps = draw_masks(cfg, cfg.data.per_process(1), 2)
    for gpu in GPUS.values():
        prediction = predict_time(cfg, gpu, steps)
        text = describe(cfg, prediction, steps, price=2.0, num_videos=1_000_000)
        assert 1e-4 < prediction.total < 1000 and 0 < prediction.flops / prediction.total < gpu.flops_per_s
        fits, over = text.count("in the largest of 2 steps: fits"), text.count("does not fit")
        assert fits + over == 1, text
        assert not over or "fits with" in text or "no setting is enough" in text
        assert "cost" in text and "nan" not in text and "inf" not in text.replace("information", "")
