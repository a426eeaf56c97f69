"""Swapped stand-ins, what they compute, and the fixtures of tests of swapping."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vjepa_fast.models import layers

from .stand_ins import V1, V2, V21, make_clips, make_masks, randomise

Three = tuple[Any, Any, Any]


@pytest.fixture
def same_start() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its own modules")
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often our attention is called, in its only element."""
    count, attention = [0], layers.attention

    def counting(*args: Any) -> Tensor:
        count[0] += 1
        return attention(*args)

    monkeypatch.setattr(layers, "attention", counting)
    return count


def v1(num_mask_tokens: int = 2) -> Three:
    return _three(
        V1.MultiMaskWrapper(V1.VisionTransformer()),
        V1.PredictorMultiMaskWrapper(V1.VisionTransformerPredictor(num_mask_tokens)),
    )


def v2(**options: Any) -> Three:
    predictor = V2.VisionTransformerPredictor(**{key: value for key, value in options.items() if key != "drop_path"})
    return _three(V2.MultiSeqWrapper(V2.VisionTransformer(**options)), V2.PredictorMultiSeqWrapper(predictor))


def _three(encoder: nn.Module, predictor: nn.Module) -> Three:
    randomise(encoder, predictor)
    target = copy.deepcopy(encoder).requires_grad_(False)
    randomise(target)
    return encoder, predictor, target


def v21(return_all_tokens: bool = True) -> Three:
    return _three(
        V21.MultiSeqWrapper(V21.VisionTransformer()),
        V21.PredictorMultiSeqWrapper(V21.VisionTransformerPredictor(return_all_tokens)),
    )


def run(modules: Three, frames: tuple[int, ...] = (8,), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Everything that a training step computes, under the names of what it is."""
    encoder, predictor, target = modules
    torch.manual_seed(1)
    clips = [make_clips(3, count).to(dtype) for count in frames]
    pairs = [make_masks(3, count, seed) for seed, count in enumerate(frames)]
    masks_enc, masks_pred = [p[0] for p in pairs], [p[1] for p in pairs]
    for parameter in encoder.parameters():
        parameter.grad = None
    for parameter in predictor.parameters():
        parameter.grad = None
    options = {"training_mode": True} if hasattr(_plain(encoder).backbone, "norms_block") else {}
    with torch.no_grad():
        h = target(clips[0] if "MultiMask" in type(_plain(encoder)).__name__ else clips, **options)
    if isinstance(h, Tensor):
        z = encoder(clips[0], masks_enc[0])
        targets = [h[:, : ids.shape[1]] for ids in masks_pred[0]]
        y = predictor(z, targets, masks_enc[0], masks_pred[0])
    elif options:
        z = encoder(clips, masks_enc, **options)
        y = predictor(z, masks_enc, masks_pred, mod="image" if frames == (1,) else "video")
    else:
        z = encoder(clips, masks_enc)
        y = predictor(z, masks_enc, masks_pred)
    sum(out.square().mean() for out in flatten(y)).backward()
    outputs = (("h", h), ("z", z), ("y", y))
    found = {f"{name} {i}": out for name, value in outputs for i, out in enumerate(flatten(value))}
    return found | {
        name: parameter.grad
        for part in modules[:2]
        for name, parameter in part.named_parameters()
        if parameter.grad is not None
    }


def _plain(module: Any) -> Any:
    while hasattr(module, "_orig_mod") or isinstance(module, nn.parallel.DistributedDataParallel):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def flatten(value: Any) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else [out for part in value for out in flatten(part)]


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if str(name).endswith("qkv.bias"):
            # Without RoPE a bias of the keys changes nothing: what is there is noise.
            parts = [torch.cat([x[: len(x) // 3], x[2 * len(x) // 3 :]]) for x in (found[name], value)]
        else:
            parts = [found[name], value]
        difference = (parts[0].double() - parts[1].double()).norm() / parts[1].double().norm()
        assert difference <= tolerance, (name, difference)


CASES: dict[str, tuple[Callable[[], Three], tuple[int, ...]]] = {
    "v1": (v1, (8,)),
    "v1 noised targets": (lambda: v1(0), (8,)),
    "v2": (v2, (8,)),
    "v2 two groups": (v2, (8, 4)),
    "v2 sincos two groups": (lambda: v2(rope=False), (8, 4)),
    "v2 swiglu": (lambda: v2(silu=True), (8,)),
    "v2.1": (v21, (8,)),
    "v2.1 images, one head": (lambda: v21(False), (1,)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
