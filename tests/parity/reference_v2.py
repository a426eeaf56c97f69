"""The reference's own modules (facebookresearch/vjepa2), run at our sizes.

`timm` is needed by one import of theirs alone, for a function that these runs never call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vjepa_fast.bench.reference import REFERENCE_COMMIT, load_modules, normalise

from . import reference
from .cases import Batch, Case
from .frame_cases import FrameCase, FrameResult
from .mask_cases import MaskCase, Masks
from .reference import Checkout, Triple

CHECKOUT = Checkout("VJEPA2_REFERENCE", "facebookresearch/vjepa2", REFERENCE_COMMIT)
needs_reference = CHECKOUT.needed


def modules() -> types.SimpleNamespace:
    """The reference's modules, see load_modules."""
    return load_modules(CHECKOUT.root)


def training_script() -> types.ModuleType:
    """The module app/vjepa/train.py; importing it seeds the global generators."""
    with CHECKOUT.environment():
        return importlib.import_module("app.vjepa.train")


def build_encoder(case: Case, **overrides: Any) -> nn.Module:
    """The reference's VisionTransformer at the sizes of `case`; `overrides` are its own arguments."""
    return modules().vit.VisionTransformer(
        **{
            **_shared(case),
            "embed_dim": case.embed_dim,
            "depth": case.depth,
            "num_heads": case.num_heads,
            "use_silu": case.use_silu,
            **overrides,
        }
    )


def build(case: Case, dtype: torch.dtype = torch.float32, zero_init_mask_tokens: bool = True) -> Triple:
    """The three modules of `case` with the reference's own initialisation (torch's global seed)."""
    wrappers = modules().wrappers
    encoder = wrappers.MultiSeqWrapper(build_encoder(case))
    predictor = wrappers.PredictorMultiSeqWrapper(
        modules().predictor.VisionTransformerPredictor(
            embed_dim=case.embed_dim,
            predictor_embed_dim=case.pred_embed_dim,
            depth=case.pred_depth,
            num_heads=case.pred_num_heads,
            use_silu=case.use_pred_silu,
            use_mask_tokens=True,
            num_mask_tokens=case.num_mask_tokens,
            zero_init_mask_tokens=zero_init_mask_tokens,
            **_shared(case),
        )
    )
    triple = Triple(encoder.to(dtype), predictor.to(dtype), copy.deepcopy(encoder))
    triple.target_encoder.requires_grad_(False)
    return triple


def _shared(case: Case) -> dict[str, Any]:
    return {
        "img_size": case.crop_size,
        "patch_size": case.patch_size,
        "num_frames": max(case.frames),
        "tubelet_size": case.tubelet_size,
        "uniform_power": case.uniform_power,
        "use_rope": case.use_rope,
        "wide_silu": case.wide_silu,
        "use_sdpa": True,
        "mlp_ratio": 4.0,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
    }


class Training(reference.Training):
    """The reference's step (app/vjepa/train.py, train_step)."""

    def __init__(self, triple: Triple, case: Case) -> None:
        super().__init__(triple, case, functools.partial(modules().utils.init_opt, is_anneal=False))

    def loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """The loss of one batch and its margin."""
        triple, exponent = self.triple, self.case.loss_exp
        clips = [normalise(clip, next(triple.encoder.parameters()).dtype) for clip in batch.clips]
        with torch.no_grad():
            targets = [F.layer_norm(h, h.shape[-1:]) for h in triple.target_encoder(clips)]
        predictions = triple.predictor(triple.encoder(clips, batch.masks_enc), batch.masks_enc, batch.masks_pred)
        terms, margin = [], float("inf")
        for group, target in enumerate(targets):
            chosen = modules().mask_utils.apply_masks(target, batch.masks_pred[group], concat=False)
            for prediction, wanted in zip(predictions[group], chosen, strict=True):
                distance = (prediction - wanted).abs()
                margin = min(margin, distance.min().item())
                terms.append((distance**exponent).mean() / exponent)
        return torch.stack(terms).mean(), margin


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Build the reference's modules without memory; the drop path rates they read back stay on the CPU."""
    linspace = torch.linspace
    on_cpu = mock.patch.object(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"}))
    with torch.device("meta"), on_cpu:
        yield


def collator(case: MaskCase) -> Any:
    """The reference's MaskCollator of `case`."""
    return modules().masks.MaskCollator(
        cfgs_mask=case.masks,
        dataset_fpcs=case.fpcs,
        crop_size=case.crop_size,
        patch_size=case.patch_size,
        tubelet_size=case.tubelet_size,
    )


def collate(collate_masks: Any, batch_sizes: dict[int, int]) -> Masks:
    """What a collator draws for a batch of samples that hold nothing but their frame numbers."""
    batch = [(torch.zeros(1), 0, [torch.arange(fpc)]) for fpc, size in batch_sizes.items() for _ in range(size)]
    return {sample[-1][-1].shape[1]: (enc, pred) for sample, enc, pred in collate_masks(batch)}


class FakeVideo:
    """What the loader asks of decord's VideoReader."""

    def __init__(self, case: FrameCase) -> None:
        self._case = case

    def __len__(self) -> int:
        return self._case.num_frames

    def get_avg_fps(self) -> float:
        return self._case.avg_fps

    def seek(self, number: int) -> None:
        assert number == 0

    def get_batch(self, numbers: list[int]) -> Any:
        return types.SimpleNamespace(asnumpy=lambda: np.zeros(len(numbers)))


@functools.cache
def _video_dataset() -> types.ModuleType:
    """The module src/datasets/video_dataset.py, without the packages that decode and read tables for it."""
    stand_ins = {name: types.ModuleType(name) for name in ("decord", "pandas", "torchvision", "psutil")}
    stand_ins["decord"].VideoReader = stand_ins["decord"].cpu = None  # type: ignore[attr-defined]
    with CHECKOUT.environment(), mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("src.datasets.video_dataset")


def segment_frame_numbers(case: FrameCase, segments: int, places: list[float]) -> list[np.ndarray]:
    """The frames of each segment in the reference's evaluations, its draws replaced by places from 0 to 1."""
    module, left = _video_dataset(), list(places)

    def draw(low: int, high: int) -> int:
        return low + round(left.pop(0) * (high - low))

    with (
        mock.patch.object(module, "VideoReader", lambda *_, **__: FakeVideo(case)),
        mock.patch.object(module, "cpu", lambda _: None),
        mock.patch.object(np.random, "randint", draw),
    ):
        dataset = module.VideoDataset([], dataset_fpcs=[], num_clips=segments, allow_clip_overlap=True, **case.settings)
        numbers: list[np.ndarray] = dataset.loadvideo_decord(__file__, case.fpc)[1]
    return numbers


def frame_numbers(case: FrameCase, seed: int) -> FrameResult:
    """The frames that the reference's loader takes of a video, by its own code; `seed` is numpy's global one."""
    module, drawn = _video_dataset(), []
    randint = np.random.randint

    def draw(low: int, high: int) -> int:
        end = int(randint(low, high))
        drawn.append(end - low)
        return end

    np.random.seed(seed)
    with (
        mock.patch.object(module, "VideoReader", lambda *_, **__: FakeVideo(case)),
        mock.patch.object(module, "cpu", lambda _: None),
        mock.patch.object(np.random, "randint", draw),
    ):
        dataset = module.VideoDataset([], dataset_fpcs=[], **case.settings)
        try:
            _, (numbers,) = dataset.loadvideo_decord(__file__, case.fpc)
        except AssertionError:
            return FrameResult(None, None)
    return FrameResult(drawn[0] if drawn else None, numbers)
