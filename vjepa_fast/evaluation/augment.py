"""The reference's augmentations for frozen evaluation: RandAugment, crop, erasing.

Reference: evals/video_classification_frozen/utils.py (VideoTransform): RandAugment `rand-m7-n4-mstd0.5-inc1` on whole
frames (Cubuk et al., arXiv 1909.13719), a crop of 8 to 100 % of the area at a ratio of 3/4 to 4/3, no flip, and with
probability 1/4 a rectangle of noise (Zhong et al., arXiv 1708.04896), the same place in every frame. All frames of a
clip are treated alike. Pixels stay uint8: the noise, normal after normalisation, is cut off at black and white.

Everything is drawn from one generator, so that a clip is a pure function of what seeds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vjepa_fast.data.sampling import Box
from vjepa_fast.ops.patch_embed import MEAN, STD

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
NUM_LAYERS, MAGNITUDE, MAGNITUDE_STD, MAX_MAGNITUDE = 4, 7.0, 0.5, 10.0
_LAYER_PROBABILITY = 0.5
_ERASE_PROBABILITY, _ERASE_AREA, _ERASE_RATIO, _ERASE_TRIES = 0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), 100
_GREY = (128, 128, 128)

Picture = Image.Image
_Change = Callable[[Picture], Picture]


def _affine(matrix: tuple[float, float, float, float, float, float]) -> _Change:
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_GREY
    )


def _shift(share: float, axis: int) -> _Change:
    """By a share of the width (axis 0) or the height (axis 1)."""

    def apply(picture: Picture) -> Picture:
        pixels = share * picture.size[axis]
        return _affine((1, 0, pixels if axis == 0 else 0, 0, 1, pixels if axis == 1 else 0))(picture)

    return apply


def _lighten_dark(amount: int) -> _Change:
    table = [min(255, value + amount) if value < 128 else value for value in range(256)] * 3
    return lambda picture: picture.point(table)


def _posterize(bits: int) -> _Change:
    return lambda picture: ImageOps.posterize(picture, bits) if bits < 8 else picture


OPERATIONS: dict[str, Callable[[float, float], _Change]] = {
    "AutoContrast": lambda level, sign: ImageOps.autocontrast,
    "Equalize": lambda level, sign: ImageOps.equalize,
    "Invert": lambda level, sign: ImageOps.invert,
    "Rotate": lambda level, sign: (
        lambda picture: picture.rotate(sign * level * 30, Image.Resampling.BICUBIC, fillcolor=_GREY)
    ),
    "Posterize": lambda level, sign: _posterize(4 - int(level * 4)),
    "Solarize": lambda level, sign: lambda picture: ImageOps.solarize(picture, 256 - int(level * 256)),
    "SolarizeAdd": lambda level, sign: _lighten_dark(int(level * 110)),
    "Color": lambda level, sign: lambda picture: ImageEnhance.Color(picture).enhance(1 + sign * level * 0.9),
    "Contrast": lambda level, sign: lambda picture: ImageEnhance.Contrast(picture).enhance(1 + sign * level * 0.9),
    "Brightness": lambda level, sign: lambda picture: ImageEnhance.Brightness(picture).enhance(1 + sign * level * 0.9),
    "Sharpness": lambda level, sign: lambda picture: ImageEnhance.Sharpness(picture).enhance(1 + sign * level * 0.9),
    "ShearX": lambda level, sign: _affine((1, sign * level * 0.3, 0, 0, 1, 0)),
    "ShearY": lambda level, sign: _affine((1, 0, 0, sign * level * 0.3, 1, 0)),
    "TranslateX": lambda level, sign: _shift(sign * level * 0.45, 0),
    "TranslateY": lambda level, sign: _shift(sign * level * 0.45, 1),
}
"""By (magnitude / MAX_MAGNITUDE, +1 or -1); stronger with the magnitude, but for the first three, which have none."""


def rand_augment(frames: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] after up to NUM_LAYERS operations, chosen with replacement, the same for all frames."""
    names = list(OPERATIONS)
    pictures = [Image.fromarray(frame) for frame in frames]
    for number in draw.integers(len(names), size=NUM_LAYERS):
        skipped, sign = draw.random() > _LAYER_PROBABILITY, -1.0 if draw.random() > 0.5 else 1.0
        magnitude = min(MAX_MAGNITUDE, max(0.0, draw.normal(MAGNITUDE, MAGNITUDE_STD)))
        if not skipped:
            change = OPERATIONS[names[number]](magnitude / MAX_MAGNITUDE, sign)
            pictures = [change(picture) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in pictures])


def crop_and_resize(frames: np.ndarray, box: Box, size: tuple[int, int]) -> Tensor:
    """Bilinear, without antialiasing, as the reference's; uint8 [T, *size, 3]."""
    own = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    pixels = torch.from_numpy(np.ascontiguousarray(own)).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def erase(clip: Tensor, draw: np.random.Generator) -> Tensor:
    """A clip uint8 [T, H, W, 3], one time in four with a rectangle of noise."""
    if draw.random() > _ERASE_PROBABILITY:
        return clip
    num_frames, height, width = clip.shape[:3]
    low, high = map(math.log, _ERASE_RATIO)
    for _ in range(_ERASE_TRIES):
        area = draw.uniform(*_ERASE_AREA) * height * width
        ratio = math.exp(draw.uniform(low, high))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            top, left = int(draw.integers(height - tall + 1)), int(draw.integers(width - wide + 1))
            noise = draw.standard_normal((num_frames, tall, wide, 3)) * STD + MEAN
            clip = clip.clone()
            clip[:, top : top + tall, left : left + wide] = torch.from_numpy(
                (255 * noise).round().clip(0, 255).astype(np.uint8)
            )
            break
    return clip
