"""V-JEPA 1's own modules (facebookresearch/jepa), run at our sizes."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vjepa_fast.bench.reference import normalise

from . import reference
from .cases import Batch
from .cases_v1 import V1_OPTIMIZATION, V1Case, v1_noise
from .frame_cases import FrameCase
from .reference import Checkout, Triple
from .reference_v2 import FakeVideo

Masks = tuple[list[torch.Tensor], list[torch.Tensor]]


CHECKOUT = Checkout("VJEPA1_REFERENCE", "facebookresearch/jepa")
needs_reference = CHECKOUT.needed

_MODULES = {
    "vit": "src.models.vision_transformer",
    "predictor": "src.models.predictor",
    "wrappers": "src.models.utils.multimask",
    "multiblock": "src.masks.multiblock3d",
    "tube": "src.masks.random_tube",
    "mask_utils": "src.masks.utils",
    "tensors": "src.utils.tensors",
    "utils": "app.vjepa.utils",
}


@functools.cache
def modules() -> types.SimpleNamespace:
    """The reference's modules by short names."""
    return CHECKOUT.load(_MODULES, {})


def build(case: V1Case, dtype: torch.dtype = torch.float32) -> Triple:
    """The three modules of `case` with the initialisation of the reference's classes (torch's global seed)."""
    shared = {
        "img_size": case.crop_size,
        "patch_size": case.patch_size,
        "num_frames": max(case.frames),
        "tubelet_size": case.tubelet_size,
        "uniform_power": case.uniform_power,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
        "num_heads": case.num_heads,
    }
    encoder = modules().wrappers.MultiMaskWrapper(
        modules().vit.VisionTransformer(embed_dim=case.embed_dim, depth=case.depth, **shared)
    )
    predictor = modules().wrappers.PredictorMultiMaskWrapper(
        modules().predictor.VisionTransformerPredictor(
            embed_dim=case.embed_dim,
            predictor_embed_dim=case.pred_embed_dim,
            depth=case.pred_depth,
            use_mask_tokens=case.use_mask_tokens,
            num_mask_tokens=case.num_masks,
            **shared,
        )
    )
    triple = Triple(encoder.to(dtype), predictor.to(dtype), copy.deepcopy(encoder))
    triple.target_encoder.requires_grad_(False)
    return triple


def build_by_script(case: V1Case) -> Triple:
    """The same by init_video_model, which initialises anew (torch's global seed)."""
    vit = modules().vit
    # The script looks sizes up by name in this module.
    vit.vit_parity = functools.partial(
        vit.VisionTransformer,
        embed_dim=case.embed_dim,
        depth=case.depth,
        num_heads=case.num_heads,
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )
    encoder, predictor = modules().utils.init_video_model(
        device="cpu",
        patch_size=case.patch_size,
        num_frames=max(case.frames),
        tubelet_size=case.tubelet_size,
        model_name="vit_parity",
        crop_size=case.crop_size,
        pred_depth=case.pred_depth,
        pred_embed_dim=case.pred_embed_dim,
        uniform_power=case.uniform_power,
        use_mask_tokens=case.use_mask_tokens,
        num_mask_tokens=case.num_masks,
    )
    return Triple(encoder, predictor, copy.deepcopy(encoder))


@contextlib.contextmanager
def _drawn(case: V1Case, step: int, counts: list[int]) -> Iterator[None]:
    """The predictor's noise is that of v1_noise: a level, then normal numbers for each mask."""
    drawn: Iterator[torch.Tensor] = iter(
        x for mask, count in enumerate(counts) for x in v1_noise(case, step, mask, count)
    )
    with (
        mock.patch.object(torch, "randint", lambda *_, **__: next(drawn)),
        mock.patch.object(torch, "randn", lambda *_, **__: next(drawn)),
    ):
        yield


class Training(reference.Training):
    """The reference's step (app/vjepa/train.py:408-500)."""

    def __init__(self, triple: Triple, case: V1Case) -> None:
        super().__init__(triple, case, modules().utils.init_opt, V1_OPTIMIZATION)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        triple, case = self.triple, self.case
        assert isinstance(case, V1Case)
        clips = normalise(batch.clips[0], next(triple.encoder.parameters()).dtype)
        enc, pred = (
            [modules().tensors.repeat_interleave_batch(ids, case.batch_size, repeat=case.num_clips) for ids in masks[0]]
            for masks in (batch.masks_enc, batch.masks_pred)
        )
        with torch.no_grad():
            target = triple.target_encoder(clips)
            targets = modules().mask_utils.apply_masks(F.layer_norm(target, target.shape[-1:]), pred, concat=False)
        with _drawn(case, self.count, [ids.shape[1] for ids in pred]):
            predictions = triple.predictor(triple.encoder(clips, enc), targets, enc, pred)
        distances = [(z - h).abs() for z, h in zip(predictions, targets, strict=True)]
        loss = torch.stack([(d**case.loss_exp).mean() / case.loss_exp for d in distances]).mean()
        spread = torch.stack([(z.var(dim=1) + 0.0001).sqrt() for z in predictions]).mean(0)
        return loss + case.reg_coeff * F.relu(1 - spread).mean(), min(d.min().item() for d in distances)

    def clip(self) -> None:
        assert isinstance(self.case, V1Case)
        if self.case.clip_grad is not None and self.count // V1_OPTIMIZATION["ipe"] > V1_OPTIMIZATION["warmup"]:
            for network in (self.triple.encoder, self.triple.predictor):
                torch.nn.utils.clip_grad_norm_(network.parameters(), self.case.clip_grad)

    def move_target(self, momentum: float) -> None:
        with torch.no_grad():
            for new, old in zip(self.triple.encoder.parameters(), self.triple.target_encoder.parameters(), strict=True):
                old.mul_(momentum).add_((1 - momentum) * new)


def collate(masks: list[dict[str, object]], kind: str, crop_size: int, num_frames: int) -> Callable[[int], Masks]:
    """The reference's collator, asked by the number of clips; `kind` is multiblock or tube."""
    collator = getattr(modules(), kind).MaskCollator(
        cfgs_mask=masks, crop_size=crop_size, num_frames=num_frames, patch_size=8, tubelet_size=2
    )
    return lambda count: collator([torch.zeros(1)] * count)[1:]


@functools.cache
def _video_dataset() -> types.ModuleType:
    """The module src/datasets/video_dataset.py, without the packages that decode and read tables for it."""
    stand_ins = {name: types.ModuleType(name) for name in ("decord", "pandas")}
    stand_ins["decord"].VideoReader = stand_ins["decord"].cpu = None  # type: ignore[attr-defined]
    with CHECKOUT.environment(), mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("src.datasets.video_dataset")


def frame_numbers(case: FrameCase, num_clips: int, seed: int) -> tuple[list[int], list[np.ndarray]]:
    """Where the windows begin that the reference's loader draws, and the frames of each clip; numpy's global seed."""
    module, starts = _video_dataset(), []
    randint = np.random.randint

    def draw(low: int, high: int) -> int:
        starts.append(int(randint(low, high)) - low)
        return starts[-1] + low

    np.random.seed(seed)
    with (
        mock.patch.object(module, "VideoReader", lambda *_, **__: FakeVideo(case)),
        mock.patch.object(module, "cpu", lambda _: None),
        mock.patch.object(np.random, "randint", draw),
    ):
        settings = {"duration": case.value} if case.rule == "duration" else {"frame_step": case.value}
        dataset = module.VideoDataset([], frames_per_clip=case.fpc, num_clips=num_clips, **settings)
        _, numbers = dataset.loadvideo_decord(__file__)
    return starts, numbers
