"""A pretrained model for inference: features of clips, predictions at chosen positions, future states.

Only the networks that are used are in memory: one encoder, and the predictor where the file has one.

Legend: B clips, T frames, H W pixels, N tokens of a clip, K predicted tokens, D encoder width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vjepa_fast.common.errors import UserError
from vjepa_fast.masking.batch import Grid, MaskBatch
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer


class CheckpointWarning(UserWarning):
    """Something about a model that its file does not say, and was assumed."""


class InferenceModel(nn.Module):
    """An encoder, and a predictor or None, in eval mode.

    Attributes:
        encoder: vjepa_fast.models.vit.VisionTransformer.
        predictor: vjepa_fast.models.predictor.Predictor, or None where the file has none.
        cfg: the model's config.
        data: fields of DataConfig that the file names: fps and so on.
        weights: key of the encoder in the file, such as `target_encoder`.
        assumed: a sentence for everything the file did not say.
    """

    predictor: Predictor | None

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor | None,
        data: dict[str, Any] | None = None,
        weights: str = "encoder",
        assumed: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.cfg = encoder, predictor, encoder.cfg
        self.data, self.weights, self.assumed = data or {}, weights, list(assumed)
        self._warned = False
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.encoder.parameters()).device

    def grid_of(self, clips: Tensor) -> Grid:
        """(T, H, W) in tokens of what `encode` makes of some clips."""
        return self.encoder.grid_of(self._prepare(clips))

    @torch.no_grad()
    def encode(
        self, clips: Tensor, out_layers: Sequence[int] | None = None, pool: Literal["mean"] | None = None
    ) -> Any:
        """Features of clips.

        Args:
            clips: [B, T, H, W, 3], [B, 3, T, H, W] or [B, T, 3, H, W]; images [B, H, W, 3] or [B, 3, H, W]; one image
                [H, W, 3] or [3, H, W]. uint8 is raw, float is normalised by ImageNet's mean and deviation. Any number
                of frames: the last is repeated up to a whole tubelet, and an image up to one. Any height and width:
                what is left over a multiple of the patch at the bottom and at the right is cut off, as in the
                reference's convolution.
            out_layers: block numbers from 0, negative from the end; their outputs, each through the last norm.
            pool: `mean` averages over the tokens.

        Returns:
            [B, N, D], or [B, D] pooled, of the compute dtype; a list of these for `out_layers`.

        Raises:
            ValueError: clips of another shape or dtype, or a block that is not there.
        """
        if pool not in (None, "mean"):
            raise ValueError(f"pool is {pool!r}; expected None or 'mean'")
        clips = self._prepare(clips)
        if out_layers is None:
            features = self.encoder(clips)
            return features if pool is None else features.mean(1)
        outputs = self._layers(clips, out_layers)
        return outputs if pool is None else [one.mean(1) for one in outputs]

    def _layers(self, clips: Tensor, out_layers: Sequence[int]) -> list[Tensor]:
        depth = len(self.encoder.blocks)
        wrong = [layer for layer in out_layers if not -depth <= layer < depth]
        if wrong or not out_layers:
            raise ValueError(f"out_layers is {list(out_layers)}; the encoder has blocks 0 to {depth - 1}")
        numbers = [layer % depth for layer in out_layers]
        before, self.encoder.out_layers = self.encoder.out_layers, sorted(set(numbers))
        try:
            outputs = dict(zip(self.encoder.out_layers, self.encoder(clips), strict=True))
        finally:
            self.encoder.out_layers = before
        return [outputs[number] for number in numbers]

    @torch.no_grad()
    def predict(self, clips: Tensor, positions: Tensor, context: Tensor | None = None, mask_token: int = 0) -> Tensor:
        """Predicted features of some tokens of clips, from the others.

        The predictor was trained to give the target encoder's features after a layer norm without weights:
        compare with `F.layer_norm(model.encode(clips), (D,))` of the target encoder.

        Args:
            clips: as `encode`.
            positions: token ids int64 [K] or [B, K], (t * H + h) * W + w within the grid of `grid_of`; or bool
                [T, H, W] over that grid.
            context: the tokens to predict from, as `positions`; None: all others.
            mask_token: which of the learned mask tokens stands for the unknown. Training with one frames-per-clip group
                uses 0 (V-JEPA 1: one a mask); the reference's hub and Hugging Face take 1.

        Returns:
            [B, K, D]; of V-JEPA 2.1, features of all its depths side by side, [B, K, 4 * D] (a distilled model: of its
            teacher's width); of a run on pixels normalised pixels, [B, K, 3 * tubelet * patch^2], channel by channel.

        Raises:
            UserError: there is no predictor, or one that wants noised targets (use_mask_tokens: false).
            ValueError: ids outside the grid, no context left, or clips that do not fit.
        """
        predictor = self._needed_predictor()
        clips = self._prepare(clips)
        grid = self.encoder.grid_of(clips)
        num_tokens = grid[0] * grid[1] * grid[2]
        target_ids = self._ids(positions, "positions", grid, len(clips))
        if context is None:
            free = torch.ones(len(clips), num_tokens, dtype=torch.bool, device=clips.device)
            free.scatter_(1, target_ids, False)
            counts = free.sum(1)
            if int(counts.min()) == 0:
                raise ValueError(f"positions name all {num_tokens} tokens of a clip; nothing is left to predict from")
            if int(counts.min()) != int(counts.max()):
                raise ValueError("positions of some clips name a token twice; give every token once")
            context_ids = free.nonzero()[:, 1].view(len(clips), -1)
        else:
            context_ids = self._ids(context, "context", grid, len(clips))
        masks = MaskBatch.from_meta([context_ids], [target_ids], grid)
        features, _ = self.encoder.forward_packed([clips], [masks])
        return self._predicted(predictor, features, masks, mask_token, self.encoder.is_image(clips))

    @torch.no_grad()
    def predict_future(self, clips: Tensor, num_frames: int, mask_token: int = 0) -> Tensor:
        """Predicted features of the frames that follow clips.

        Args:
            clips: as `encode`: the past, of which all tokens are seen.
            num_frames: frames to predict, rounded up to whole tubelets.
            mask_token: as `predict`.

        Returns:
            As `predict`, tubelet by tubelet, K = ceil(num_frames / tubelet) * H * W tokens.

        Raises:
            UserError: there is no predictor.
            ValueError: num_frames below 1, or a predictor with position tables too short for past and future.
        """
        predictor = self._needed_predictor()
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; expected at least 1")
        clips = self._prepare(clips, image=False)
        past, height, width = self.encoder.grid_of(clips)
        future = -(-num_frames // self.encoder.tubelet_size)
        if predictor.predictor_pos_embed is not None and past + future > predictor.grid[0]:
            tubelet = self.encoder.tubelet_size
            raise ValueError(
                f"{past * tubelet} frames and {future * tubelet} predicted ones are more than the "
                f"{predictor.grid[0] * tubelet} that this predictor's positions are for; give fewer "
                "frames, such as the last ones of the clip"
            )
        features, _ = self.encoder.forward_packed([clips])
        ids = torch.arange((past + future) * height * width, device=clips.device).expand(len(clips), -1)
        seen = past * height * width
        masks = MaskBatch.from_meta([ids[:, :seen]], [ids[:, seen:]], (past + future, height, width))
        return self._predicted(predictor, features, masks, mask_token)

    @staticmethod
    def _predicted(
        predictor: Predictor, features: Tensor, masks: MaskBatch, mask_token: int, image: bool = False
    ) -> Tensor:
        out = predictor.forward_packed(features, [masks], [mask_token], images=[image])
        return out.view(masks.batch_size, -1, out.shape[-1])

    def _needed_predictor(self) -> Predictor:
        if self.predictor is None:
            raise UserError(
                "this model has no predictor: its file holds an encoder alone, or it was left out when the "
                "file was converted or loaded. Load a checkpoint with a key `predictor` to predict"
            )
        if not self.cfg.use_mask_tokens:
            raise UserError(
                "this model's predictor was trained with noised targets in place of mask tokens "
                "(use_mask_tokens: false), so that it predicts nothing without them"
            )
        return self.predictor

    def _ids(self, given: Tensor, name: str, grid: Grid, batch_size: int) -> Tensor:
        """int64 [B, K]."""
        given = torch.as_tensor(given, device=self.device)
        if given.dtype == torch.bool:
            if tuple(given.shape) != tuple(grid):
                raise ValueError(f"{name} has shape {list(given.shape)}; expected {list(grid)}, the tokens of a clip")
            given = given.flatten().nonzero()[:, 0]
        if given.ndim == 1:
            given = given.expand(batch_size, -1)
        if given.is_floating_point() or given.ndim != 2 or len(given) != batch_size or given.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {list(given.shape)} and dtype {given.dtype}; expected token ids [K] or "
                f"[{batch_size}, K], or bool {list(grid)}"
            )
        num_tokens = grid[0] * grid[1] * grid[2]
        if int(given.min()) < 0 or int(given.max()) >= num_tokens:
            raise ValueError(
                f"{name} holds ids {int(given.min())} to {int(given.max())}; clips of {tuple(grid)} have "
                f"tokens 0 to {num_tokens - 1}"
            )
        return given.long()

    def _prepare(self, clips: Tensor, image: bool = True) -> Tensor:
        """Any accepted input as [B, T, H, W, 3] of whole tubelets and patches, on the model's device.

        One frame stays one in V-JEPA 2.1, which has a patch embedding for it, unless `image` is false.
        """
        if not isinstance(clips, Tensor):
            raise ValueError(f"clips are a {type(clips).__name__}; expected a torch.Tensor")
        if clips.dtype != torch.uint8 and not clips.is_floating_point():
            raise ValueError(f"clips have dtype {clips.dtype}; expected uint8 (raw) or a float dtype (normalised)")
        shape = list(clips.shape)
        if clips.ndim == 3:
            clips = clips[None]
        if clips.ndim == 5 and clips.shape[-1] != 3 and clips.shape[1] != 3 and clips.shape[2] == 3:
            clips = clips.transpose(1, 2)
        if clips.ndim not in (4, 5) or (clips.shape[-1] != 3 and clips.shape[1] != 3):
            raise ValueError(
                f"clips have shape {shape}; expected [B, T, H, W, 3], [B, 3, T, H, W] or [B, T, 3, H, W], "
                "or images [B, H, W, 3] or [B, 3, H, W]"
            )
        if clips.shape[-1] != 3:
            clips = clips.movedim(1, -1)
        if clips.ndim == 4:
            clips = clips[:, None]
        patch, tubelet = self.encoder.patch_size, self.encoder.tubelet_size
        if min(clips.shape[2:4]) < patch or 0 in clips.shape:
            raise ValueError(
                f"clips have shape {shape}; expected at least one frame of at least {patch} x {patch} pixels, a patch"
            )
        height, width = (side // patch * patch for side in clips.shape[2:4])
        clips = clips[:, :, :height, :width]
        missing = -clips.shape[1] % tubelet
        if missing and not (image and self.encoder.is_image(clips)):
            clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        clips = clips.to(self.device)
        if not self._warned and clips.is_floating_point():
            self._warned = True
            if bool((clips >= 0).all()):
                warnings.warn(
                    "float clips are taken as normalised by ImageNet's mean and deviation, but these have no "
                    "negative value; pass raw pixels as uint8",
                    CheckpointWarning,
                    stacklevel=3,
                )
        return clips
