"""V-JEPA 1's mask collators, frame numbers, initialisation and checkpoints beside ours."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.checkpoints import meta_format
from vjepa_fast.config.schema import Config, DataConfig, MaskConfig, MaskSpec
from vjepa_fast.data import sampling
from vjepa_fast.data.clip_reader import ClipReader
from vjepa_fast.masking.reference import ReferenceMaskGenerators
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.train.step import TrainStep

from . import ours, reference_v1
from .cases import recipe_weights, relative_difference, zero_gradient
from .cases_v1 import V1_CASES, V1_OPTIMIZATION, V1Case, repeated, v1_batch
from .frame_cases import FrameCase, frame_cases
from .ours import noise_of
from .reference import ignore_sdp_warning
from .test_meta_checkpoint import DataParallelNames
from .test_v2_modules import without_outliers

pytestmark = [reference_v1.needs_reference, ignore_sdp_warning]


def test_multiblock_masks_under_the_same_seed() -> None:
    masks: list[dict[str, Any]] = [
        {
            "spatial_scale": (0.15, 0.15),
            "temporal_scale": (0.5, 1.0),
            "aspect_ratio": (0.75, 1.5),
            "num_blocks": 4,
            "max_keep": 60,
        },
        {
            "spatial_scale": (0.4, 0.7),
            "temporal_scale": (1.0, 1.0),
            "aspect_ratio": (0.75, 1.5),
            "num_blocks": 2,
            "max_temporal_keep": 0.5,
        },
    ]
    theirs = reference_v1.collate(masks, "multiblock", 48, 8)
    mine = ReferenceMaskGenerators(
        MaskConfig.model_validate(masks), fpcs=[8], crop_size=(48, 48), patch_size=8, tubelet_size=2
    )
    torch.manual_seed(3)
    expected = [theirs(5) for _ in range(20)]
    torch.manual_seed(3)
    for one in expected:
        for ours_of_kind, theirs_of_kind in zip(mine({8: 5})[8], one, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours_of_kind, theirs_of_kind, strict=True))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("side", [4, 7, 14])
def test_tubes_are_drawn_by_the_same_rule(side: int, ratio: float) -> None:
    """As many places of a frame, the same in every frame, each as likely as any other."""
    spec = MaskSpec(strategy="tube", ratio=ratio, round_context_down=True)
    (enc,), (pred,) = MaskSampler(MaskConfig(masks=[spec]), (4, side, side), 1)(0, range(400)).to_meta()
    np.random.seed(0)
    (their_enc,), (their_pred,) = reference_v1.collate([{"ratio": ratio}], "tube", 8 * side, 8)(400)
    assert (enc.shape, pred.shape) == (their_enc.shape, their_pred.shape)
    counts = []
    for context, target in ((enc, pred), (their_enc, their_pred)):
        frames = target.view(400, 4, -1) - side * side * torch.arange(4)[:, None]
        assert bool((frames == frames[:, :1]).all())
        assert torch.equal(torch.cat([context, target], 1).sort(1).values[0], torch.arange(4 * side * side))
        counts.append(frames[:, 0].flatten().bincount(minlength=side * side).double())
    share = frames.shape[-1] / (side * side)
    for count in counts:
        assert bool(((count / 400 - share).abs() <= 5 * math.sqrt(share * (1 - share) / 400)).all())


def our_frame_numbers(case: FrameCase, num_clips: int, starts: list[int]) -> list[np.ndarray]:
    rule = {"duration": case.value} if case.rule == "duration" else {"frame_step": case.value}
    cfg = DataConfig(batch_size=num_clips, clips_per_video=num_clips, split_videos=True, round_fps=False, **rule)
    reader = ClipReader([SimpleNamespace(paths=["a"], fpc=case.fpc, num_phases=lambda video: 0)], [0], cfg, 0, 1, None)  # type: ignore
    source: Any = SimpleNamespace(is_image=False, num_frames=case.num_frames, avg_fps=case.avg_fps, height=64, width=64)
    found = []
    for clip in range(num_clips):
        start = np.int64(starts[clip] if starts else 0)
        with mock.patch.object(sampling, "below", lambda word, bound, start=start: start):
            found.append(reader.request(clip, 0, 0, {0: source}).frame_numbers)
    return found


@pytest.mark.parametrize("num_clips", [1, 2, 3])
def test_frame_numbers(num_clips: int) -> None:
    kinds = [0, 0]
    for seed, case in enumerate(frame_cases()[::3]):
        if case.rule == "fps":
            continue
        step = case.value if case.rule == "frame_step" else int(case.value * case.avg_fps / case.fpc)
        if step == 0 or case.num_frames < num_clips:
            # The reference takes no frames, or fails.
            continue
        starts, expected = reference_v1.frame_numbers(case, num_clips, seed)
        assert len(starts) in (0, num_clips)
        kinds[bool(starts)] += 1
        for ours_of_clip, theirs in zip(our_frame_numbers(case, num_clips, starts), expected, strict=True):
            assert np.array_equal(ours_of_clip, theirs), case
    assert min(kinds) > 20


def test_initialisation() -> None:
    """No output projection is divided, as the training script draws all linear layers once more."""
    case = V1Case("init", embed_dim=192, pred_embed_dim=192, depth=3, num_heads=6, pred_num_heads=6)
    torch.manual_seed(1)
    triple = reference_v1.build_by_script(case)
    torch.manual_seed(2)
    mine = ours.weights_of(vf.VJEPA.from_config(Config.model_validate(case.config())))
    theirs = triple.weights()
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = mine[name]
        if name.endswith("pos_embed") or bool((expected == expected.flatten()[0]).all()):
            assert torch.equal(found, expected), name
            continue
        expected = without_outliers(expected)
        assert found.std().item() == pytest.approx(expected.std().item(), rel=5 / math.sqrt(expected.numel())), name


@pytest.mark.parametrize("name", ["v1_two_clips", "v1_noised"])
def test_their_checkpoint_goes_on_here(name: str, tmp_path: Path) -> None:
    """Weights and moments to the bit, and the next step as there."""
    case = V1_CASES[name]
    triple = reference_v1.build(case, torch.float64)
    shapes = {key: tuple(value.shape) for key, value in triple.weights().items()}
    triple.load(recipe_weights(shapes, 7))
    training = reference_v1.Training(triple, case)
    for step in range(2):
        training.step(v1_batch(case, step))
    torch.save(
        {
            **{part: DataParallelNames(module).state_dict() for part, module in triple.parts()},
            "opt": training.optimizer.state_dict(),
            "scaler": None,
            "epoch": 2,
            "loss": 1.25,
            "batch_size": 3,
            "world_size": 1,
            "lr": V1_OPTIMIZATION["lr"],
        },
        tmp_path / "jepa-latest.pth.tar",
    )

    model, cfg = ours.build(case, torch.float64)
    train_step = TrainStep(model, cfg)
    info = meta_format.load_checkpoint(tmp_path / "jepa-latest.pth.tar", model, train_step.optimizer)
    assert info["epoch"] == 2
    mine = ours.weights_of(model)
    assert all(torch.equal(mine[key], value) for key, value in triple.weights().items())
    model.predictor.draw_noise = lambda masks: noise_of(case, 2, masks)  # type: ignore[method-assign]
    batch = v1_batch(case, 2)
    expected, found = training.step(batch), ours.train(model, train_step, repeated(case, batch), 2)
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)
    for key, gradient in expected.gradients.items():
        assert gradient is not None and (other := found.gradients[key]) is not None
        assert relative_difference(zero_gradient(key, case, other), zero_gradient(key, case, gradient)) <= 1e-9, key
    mine = ours.weights_of(model)
    for key, value in triple.weights().items():
        assert (mine[key] - value).abs().max().item() <= 1e-9, key
