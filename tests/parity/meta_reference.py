"""The reference's own modules (facebookresearch/vjepa2), run at our sizes.

The checkout is named by the environment variable VJEPA2_REFERENCE; it is imported at run time and nothing of it is
copied. `timm` is needed by one import of theirs alone, for a function that these runs never call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vjepa_fast.bench.reference import import_environment, load_modules, normalise

from .cases import OPTIMIZATION, Batch, Case, make_batch
from .frame_cases import FrameCase, FrameResult
from .mask_cases import MaskCase, Masks

needs_reference = pytest.mark.skipif(
    not os.environ.get("VJEPA2_REFERENCE"),
    reason="VJEPA2_REFERENCE does not name a checkout of facebookresearch/vjepa2",
)

# The reference enters torch.backends.cuda.sdp_kernel at every attention.
ignore_sdp_warning = pytest.mark.filterwarnings("ignore:.*sdp_kernel:FutureWarning")


def modules() -> types.SimpleNamespace:
    """The reference's modules, see load_modules."""
    return load_modules(Path(os.environ["VJEPA2_REFERENCE"]).resolve())


def environment() -> contextlib.AbstractContextManager[None]:
    """In which its modules can be imported."""
    return import_environment(Path(os.environ["VJEPA2_REFERENCE"]).resolve())


def training_script() -> types.ModuleType:
    """The module app/vjepa/train.py; importing it seeds the global generators."""
    with environment():
        return importlib.import_module("app.vjepa.train")


@dataclass
class Triple:
    """Encoder, predictor and target encoder behind the reference's wrappers for several sequences."""

    encoder: nn.Module
    predictor: nn.Module
    target_encoder: nn.Module

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        yield "encoder", self.encoder
        yield "predictor", self.predictor
        yield "target_encoder", self.target_encoder

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the state: `encoder.<key>`, `predictor.<key>`, `target_encoder.<key>`."""
        return {
            f"{part}.{key}": value.clone()
            for part, module in self.parts()
            for key, value in module.backbone.state_dict().items()  # type: ignore[union-attr]
        }

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Load a state as returned by `weights`; position tables may be missing."""
        for part, module in self.parts():
            own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
            missing, unexpected = module.backbone.load_state_dict(own, strict=False)  # type: ignore[union-attr]
            assert not unexpected and all(key.endswith("pos_embed") for key in missing), (missing, unexpected)


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


@dataclass
class Step:
    """What one step did: gradients are None for parameters that it did not reach.

    `margin` is the smallest |prediction - target|: the L1 loss has a kink there, and a run that rounds differently
    takes another gradient when it is not far above the rounding error.
    """

    loss: float
    gradients: dict[str, torch.Tensor | None]
    lr: float
    weight_decay: float
    momentum: float
    margin: float


@dataclass
class Run:
    steps: list[Step] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Training:
    """The reference's step (app/vjepa/train.py, train_step) over its own modules, optimizer and schedules."""

    def __init__(self, triple: Triple, case: Case) -> None:
        self.triple, self.case = triple, case
        options = OPTIMIZATION
        self.optimizer, _, self.lr_schedule, self.wd_schedule = modules().utils.init_opt(
            is_anneal=False,
            encoder=triple.encoder,
            predictor=triple.predictor,
            iterations_per_epoch=options["ipe"],
            start_lr=options["start_lr"],
            ref_lr=options["lr"],
            warmup=options["warmup"],
            num_epochs=options["epochs"],
            wd=options["weight_decay"],
            final_wd=options["final_weight_decay"],
            final_lr=options["final_lr"],
            mixed_precision=False,
            ipe_scale=options["ipe_scale"],
        )
        first, last = options["ema"]
        count = options["ipe"] * options["epochs"] * options["ipe_scale"]
        self.momenta = (first + i * (last - first) / count for i in range(int(count) + 1))

    def skip(self, num_steps: int) -> None:
        """Move the schedules as a resumed run does."""
        for _ in range(num_steps):
            self.lr_schedule.step()
            self.wd_schedule.step()
            next(self.momenta)

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

    def step(self, batch: Batch) -> Step:
        lr, weight_decay = self.lr_schedule.step(), self.wd_schedule.step()
        loss, margin = self.loss(batch)
        loss.backward()
        gradients = {
            f"{part}.{key}": None if value.grad is None else value.grad.clone()
            for part, module in list(self.triple.parts())[:2]
            for key, value in module.backbone.named_parameters()  # type: ignore[union-attr]
            if value.requires_grad
        }
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = next(self.momenta)
        with torch.no_grad():
            old: list[torch.Tensor] = list(self.triple.target_encoder.parameters())
            new: list[torch.Tensor] = list(self.triple.encoder.parameters())
            torch._foreach_mul_(old, momentum)
            torch._foreach_add_(old, new, alpha=1 - momentum)
        return Step(loss.item(), gradients, lr, weight_decay, momentum, margin)


def run(case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Run:
    """`case.num_steps` steps of the reference from `weights`."""
    triple = build(case, dtype)
    triple.load(weights)
    training = Training(triple, case)
    steps = [training.step(make_batch(case, step)) for step in range(case.num_steps)]
    return Run(steps, triple.weights())


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
    with environment(), mock.patch.dict(sys.modules, stand_ins):
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
