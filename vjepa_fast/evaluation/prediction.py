"""Compares predicted features of the future with the true ones, window by window of a video.

The context encoder sees the first tubelets of a clip, the predictor predicts all tokens of the others, and the target
encoder, which sees the whole clip, says what they are: the training's own question, with its layer norm and its L1
distance. Beside it stands what needs no predictor: the target encoder's features of the past alone, those of the last
tubelet taken for every later one (`copied`), or their mean over time (`averaged`).

Legend: B clips, T frames, P tubelets seen, F tubelets predicted, S tokens of a tubelet, L levels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.checkpoints.open import Checkpoint
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.data.decode.backend import HostPreparer
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.data.decode.request import ClipRequest, Source
from vjepa_fast.data.pool import Failed, Pool
from vjepa_fast.data.sampling import clip_step, window_frames
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference.loading import build
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.inference.videos import Videos, middle_box

_MAX_BYTES = 2 * 2**30
KINDS = ("predicted", "copied", "averaged")


@dataclass(frozen=True)
class Prediction:
    """The two halves of a model: which may be one, where a file has one encoder.

    Attributes:
        context: encoder that was trained with the predictor, and the predictor.
        target: encoder whose features it predicts.
        context_tubelets: P.
    """

    context: InferenceModel
    target: InferenceModel
    context_tubelets: int

    @classmethod
    def of(cls, context: InferenceModel, target: InferenceModel, frames: int, seen: int | None) -> Prediction:
        """Checks how many frames are seen.

        Args:
            context, target: from load_encoders.
            frames: of a clip.
            seen: of them; None: half.

        Raises:
            ConfigError: they do not fit.
        """
        tubelet = context.encoder.tubelet_size
        seen = max(tubelet, frames // 2 // tubelet * tubelet) if seen is None else seen
        if frames % tubelet or seen % tubelet or not 0 < seen < frames:
            raise ConfigError(
                f"--frames {frames} with --context {seen}: expected multiples of {tubelet}, a tubelet of "
                "this model, and more frames than are seen"
            )
        return cls(context, target, seen // tubelet)

    @torch.no_grad()
    def errors(self, clips: Tensor) -> dict[str, Tensor]:
        """L1 distance to the layer-normed features of the target encoder, mean over levels and width.

        Args:
            clips: uint8 [B, T, H, W, 3].

        Returns:
            fp32 [B, F, S] on the CPU, for each of KINDS.

        Raises:
            UserError: predictions or features are not finite.
        """
        length, height, width = self.context.grid_of(clips)
        seen, per_tubelet = self.context_tubelets, height * width
        ids = torch.arange(length * per_tubelet, device=self.context.device)
        predicted = self.context.predict(clips, ids[seen * per_tubelet :], ids[: seen * per_tubelet])
        future = self._features(clips)[:, seen * per_tubelet :]
        past = self._features(clips[:, : seen * self.context.encoder.tubelet_size])
        past = past.unflatten(1, (seen, per_tubelet))
        levels = future.shape[2]
        guesses = {
            "predicted": predicted.float().unflatten(-1, (levels, -1)),
            "copied": past[:, -1].repeat(1, length - seen, 1, 1),
            "averaged": past.mean(1).repeat(1, length - seen, 1, 1),
        }
        errors = {
            kind: (guess - future).abs().mean((2, 3)).unflatten(1, (length - seen, per_tubelet)).cpu()
            for kind, guess in guesses.items()
        }
        if not all(error.isfinite().all() for error in errors.values()):
            raise UserError(
                "predictions or features of this model are not finite numbers; most likely its training "
                "has diverged: give an earlier checkpoint"
            )
        return errors

    def _features(self, clips: Tensor) -> Tensor:
        """fp32 [B, tokens, L, D], each normed without weights."""
        encoder = self.target.encoder
        features = encoder(clips.to(self.target.device), training=True).float()
        return F.layer_norm(features.unflatten(-1, (len(encoder.levels), -1)), (encoder.embed_dim,))

    def to(self, device: torch.device) -> Prediction:
        """Moves both."""
        return Prediction(self.context.to(device), self.target.to(device), self.context_tubelets)


def load_encoders(opened: Checkpoint, dtype: Any, overrides: dict[str, Any]) -> tuple[InferenceModel, InferenceModel]:
    """The context encoder with its predictor, and the target encoder: one and the same where the file has one.

    Args:
        opened: the checkpoint.
        dtype: of the computation.
        overrides: fields of ModelConfig.

    Raises:
        UserError: no predictor, or one that predicts pixels or another model's features.
    """
    if opened.predictor is None:
        raise UserError(
            f"checkpoint {opened.path} has no predictor, which this task asks; give a training checkpoint "
            "or released weights with one"
        )
    context = build(
        opened, weights="encoder" if "encoder" in opened.encoders else None, dtype=dtype, overrides=overrides
    )
    if not context.cfg.use_mask_tokens:
        raise UserError(
            f"the predictor of checkpoint {opened.path} was trained with noised targets in place of mask "
            "tokens (use_mask_tokens: false), so that it predicts nothing without them"
        )
    if context.cfg.objective == "pixels":
        raise UserError(
            f"the predictor of checkpoint {opened.path} predicts pixels (model.objective=pixels), and this "
            "task compares features; give a checkpoint of model.objective=latent"
        )
    if context.cfg.teacher_embed_dim is not None:
        raise UserError(
            f"the model of checkpoint {opened.path} was distilled: it predicts the features of its teacher "
            "(model.teacher_embed_dim), which the file does not hold"
        )
    if opened.choose() == context.weights:
        return context, context
    return context, build(opened, dtype=dtype, predictor=False, overrides=overrides)


def window_starts(num_frames: int, length: int, stride: int) -> list[int]:
    """First frames of windows of `length` source frames, `stride` apart; the last ends with the video."""
    spare = max(0, num_frames - length)
    return sorted({*range(0, spare + 1, stride), spare})


def read_windows(source: Source, rule: ClipRule, stride: int | None) -> tuple[Tensor, np.ndarray]:
    """Windows of a video.

    Args:
        source: the video.
        rule: frames, rate and size.
        stride: clip frames from one window to the next; None: one window, in the middle.

    Returns:
        uint8 [windows, T, H, W, 3], and the frame numbers int64 [windows, T].

    Raises:
        DecodeError: it cannot be decoded, is an image, or shorter than a window.
    """
    if source.is_image:
        raise DecodeError("it is an image, which has no future")
    try:
        step = clip_step(source.avg_fps, rule.frames, fps=rule.fps, frame_step=rule.frame_step)
    except ValueError as error:
        raise DecodeError("its frame rate is unknown") from error
    length = rule.frames * step
    # The last frame of a clip is the last but `step` of its window at the latest.
    if source.num_frames < length - step + 1:
        raise DecodeError(f"it has {source.num_frames} frames, fewer than a window of {length}")
    starts = (
        [max(0, source.num_frames - length) // 2]
        if stride is None
        else window_starts(source.num_frames, length, stride * step)
    )
    size = len(starts) * rule.frames * rule.size[0] * rule.size[1] * 3
    if size > _MAX_BYTES:
        raise DecodeError(f"its {len(starts)} windows take {size / 2**30:.1f} GiB; give a larger --stride, or cut it")
    numbers = [window_frames(start, source.num_frames, rule.frames, step) for start in starts]
    box = middle_box(source.height, source.width, *rule.size)
    requests = [ClipRequest(source, own, box, rule.size, False) for own in numbers]
    return torch.stack(HostPreparer().prepare_together(requests)), np.stack(numbers)


def errors_of_videos(
    videos: Videos,
    rule: ClipRule,
    stride: int | None,
    make: Callable[[], Prediction],
    batch_size: int,
    num_workers: int,
    report: Callable[[int, dict[str, str]], None],
    broken: dict[str, str],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Number of a video, and its errors [windows, F, S] by kind, in the order they are done.

    Args:
        videos: what is measured.
        rule, stride: of read_windows.
        make: the model on its device; called once decoding has begun.
        batch_size: clips together.
        num_workers: decoding processes.
        report: called after every video with how many are done and the broken ones.
        broken: gets the reason by path.
    """

    def decode(number: int) -> Any:
        torch.set_num_threads(1)
        try:
            return read_windows(videos.open(number), rule, stride)[0].numpy()
        except DecodeError as error:
            return Failed(str(error))

    count = len(videos.paths)
    with Pool(decode, min(num_workers, count)) as pool:
        results = pool.run(range(count))
        model = make()
        for done, (number, clips) in enumerate(results, 1):
            if isinstance(clips, Failed):
                broken[videos.paths[number]] = str(clips)
            else:
                whole = torch.from_numpy(clips)
                parts = [model.errors(part) for part in whole.split(batch_size)]
                yield number, {kind: torch.cat([part[kind] for part in parts]) for kind in KINDS}
            report(done, broken)


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of [N] values; NaN for one value."""
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
