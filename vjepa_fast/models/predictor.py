"""The predictor: a narrow transformer that fills in the features of masked tokens.

Context features are projected to the predictor's width, a learned mask token stands for each token to predict, both
know their positions; after the blocks the mask tokens are projected back to the encoder's width. Without mask tokens
the projected targets themselves stand there, with noise (vjepa_fast.models.noised_targets). In V-JEPA 2.1 features are
of several depths side by side, and with a dense loss the context tokens are projected too, by a head of their own.

Legend: S sequences (mask, clip), K context tokens, K' target tokens of a sequence, L all tokens, D encoder width, P
predictor width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.masking.batch import Grid, MaskBatch
from vjepa_fast.models.layers import INIT_STD, init_weights, make_blocks, run_blocks
from vjepa_fast.models.noised_targets import Noise, noised_targets
from vjepa_fast.models.pixels import num_pixels
from vjepa_fast.models.positions import learned_table, sincos_table
from vjepa_fast.models.sizes import check_positions, size_of
from vjepa_fast.models.vit import apply_norm, compute_dtype, make_rope, modality_embedding
from vjepa_fast.ops.activation import gelu
from vjepa_fast.ops.layer_norm import LayerNorm
from vjepa_fast.ops.linear import Linear
from vjepa_fast.ops.packing import concatenate, permute_rows, sequence_of_rows
from vjepa_fast.ops.rope3d import join_ids


def _output_width(cfg: ModelConfig, embed_dim: int) -> int:
    """Of a predicted token: features of all depths side by side, in a teacher's width if it has one, or pixels."""
    assert cfg.num_frames is not None and cfg.patch_size is not None and cfg.tubelet_size is not None
    if cfg.objective == "pixels":
        return num_pixels(cfg.tubelet_size if cfg.num_frames > 1 else 1, cfg.patch_size)
    num_levels = cfg.n_output_distillation or 1
    if cfg.teacher_embed_dim is None:
        return num_levels * embed_dim
    return cfg.teacher_embed_dim // num_levels * num_levels


class Predictor(nn.Module):
    """V-JEPA's predictor. state_dict keys are those of the reference's VisionTransformerPredictor.

    Unlike the reference, RoPE uses the true height and width of the grid, so that non-square clips work.

    Attributes:
        before: called before what lies outside of the blocks is read; see Block.

    Args:
        cfg: crop_size, num_frames, patch_size and tubelet_size must be set.
    """

    before: Callable[[], None] | None = None

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.crop_size is None or cfg.num_frames is None or cfg.patch_size is None or cfg.tubelet_size is None:
            raise ConfigError("model.crop_size, num_frames, patch_size and tubelet_size must be set")
        encoder = size_of(cfg)
        width = cfg.pred_embed_dim
        self.cfg = cfg
        self.num_heads = cfg.pred_num_heads or encoder.num_heads
        if width % self.num_heads:
            raise ConfigError(
                f"model.pred_embed_dim={width} is not a multiple of the predictor's {self.num_heads} "
                "heads; set model.pred_num_heads"
            )
        check_positions("model.pred_embed_dim", width, self.num_heads, cfg)
        is_video = cfg.num_frames > 1
        self.grid: Grid = (
            cfg.num_frames // cfg.tubelet_size if is_video else 1,
            cfg.crop_size[0] // cfg.patch_size,
            cfg.crop_size[1] // cfg.patch_size,
        )
        num_levels, out_dim = cfg.n_output_distillation or 1, _output_width(cfg, encoder.embed_dim)
        self.predictor_embed: nn.Module = Linear(encoder.embed_dim, width)
        if num_levels > 1:
            self.predictor_embed = nn.Sequential(
                Linear(num_levels * encoder.embed_dim, encoder.embed_dim),
                _Activation(cfg.use_pred_silu),
                Linear(encoder.embed_dim, width),
            )
        num_tokens = (cfg.num_mask_tokens or 1) if cfg.use_mask_tokens else 0
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, width) for _ in range(num_tokens))
        self.predictor_pos_embed: nn.Parameter | None = None
        if not cfg.use_rope and cfg.positions == "learned":
            self.predictor_pos_embed = learned_table(width, self.grid)
        elif not cfg.use_rope:
            table = sincos_table(width, self.grid, cfg.uniform_power, is_video)
            self.predictor_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.predictor_blocks = make_blocks(
            cfg.pred_depth,
            width,
            self.num_heads,
            4.0,
            0.0,
            cfg.use_pred_silu,
            cfg.wide_silu,
            cfg.attention,
            cfg.compile_model is True,
        )
        self.predictor_norm = LayerNorm(width, eps=1e-6)
        self.predictor_proj = Linear(width, out_dim)
        if cfg.return_all_tokens:
            self.predictor_proj_context = Linear(width, out_dim)
        if cfg.modality_embedding:
            self.video_mod_embed = modality_embedding(width)
            self.img_mod_embed = modality_embedding(width)
        if not cfg.zero_init_mask_tokens:
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=INIT_STD)
        # The options of V-JEPA 2.1 are the encoder's.
        init_weights(self, self.predictor_blocks, "vjepa2" if cfg.init.startswith("xavier_") else cfg.init)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return compute_dtype(self.cfg, self.predictor_norm.weight)

    def forward(
        self,
        x: Tensor,
        masks_x: Tensor | list[Tensor],
        masks_y: Tensor | list[Tensor],
        mask_index: int = 1,
        targets: Tensor | None = None,
        mod: str = "video",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicted features of target tokens, with dense index lists as in the reference.

        Args:
            x: [B, K, D] context features, or [M * B, K, D] for lists of M masks.
            masks_x: int64 [B, K] ids of the context tokens, or a list of M.
            masks_y: int64 [B, K'] ids of the tokens to predict, or a list of M.
            mask_index: which mask token, modulo their number.
            targets: [B, K', D] or [M * B, K', D] layer-normed target features, for a predictor without mask tokens.
            mod: `video` or `image`.

        Returns:
            [B, K', D] or [M * B, K', D]; with cfg.return_all_tokens also what is predicted for the context tokens,
            [B, K, D] or [M * B, K, D].
        """
        if mod not in ("video", "image"):
            raise ValueError(f"mod is {mod!r}; expected video or image")
        lists = [[m] if isinstance(m, Tensor) else list(m) for m in (masks_x, masks_y)]
        masks = MaskBatch.from_meta(lists[0], lists[1], (1, *self.grid[1:]) if mod == "image" else self.grid)
        if x.shape[:2] != (masks.num_masks * masks.batch_size, lists[0][0].shape[1]):
            raise ValueError(f"context features have shape {list(x.shape)}; the masks keep {list(lists[0][0].shape)}")
        context, given = x.flatten(0, 1), None if targets is None else targets.flatten(0, 1)
        images = [mod == "image"]
        if not self.cfg.return_all_tokens:
            return self.forward_packed(context, [masks], [mask_index], given, images).view(
                len(x), lists[1][0].shape[1], -1
            )
        out, of_context = self.forward_packed_all(context, [masks], [mask_index], images)
        return out.view(len(x), lists[1][0].shape[1], -1), of_context.view(*x.shape[:2], -1)

    def forward_packed(
        self,
        context: Tensor,
        masks: Sequence[MaskBatch],
        mask_tokens: Sequence[int] | None = None,
        targets: Tensor | None = None,
        images: Sequence[bool] | None = None,
    ) -> Tensor:
        """All masks of all clips of all groups in one pass.

        Args:
            context: [sum of context lengths, D] encoder features, packed group by group as the encoder returns them.
            masks: for each group.
            mask_tokens: which mask token each group uses; None: as configured, by mask, or by group: its `mask_token`,
                else its place in the list.
            targets: [sum of target lengths, D] layer-normed target features, for a predictor without mask tokens.
            images: which groups are of images; None: none is. Only with cfg.modality_embedding does it matter.

        Returns:
            [sum of target lengths, D], packed group by group; with levels, those of all of them side by side.

        Raises:
            ValueError: there are no mask tokens, and no targets.
        """
        normed, num_context = self._run(context, masks, mask_tokens, targets, images, targets_only=True)
        return self.predictor_proj(normed[num_context:])

    def forward_packed_all(
        self,
        context: Tensor,
        masks: Sequence[MaskBatch],
        mask_tokens: Sequence[int] | None = None,
        images: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is predicted for the target and for the context tokens, which cfg.return_all_tokens has a head for.

        Args and result as forward_packed; the second tensor is [sum of context lengths, D].
        """
        normed, num_context = self._run(context, masks, mask_tokens, None, images, targets_only=False)
        return self.predictor_proj(normed[num_context:]), self.predictor_proj_context(normed[:num_context])

    def _run(
        self,
        context: Tensor,
        masks: Sequence[MaskBatch],
        mask_tokens: Sequence[int] | None,
        targets: Tensor | None,
        images: Sequence[bool] | None,
        targets_only: bool,
    ) -> tuple[Tensor, int]:
        """Normed output of the blocks, of all context and then all target tokens, or of the latter; and where the
        target tokens begin."""
        if self.before is not None:
            self.before()
        dtype = self.dtype
        if len(self.mask_tokens):
            tokens = self.predictor_embed(context.to(dtype))
            queries = torch.cat(self._queries(masks, mask_tokens))
        elif targets is not None:
            both = self.predictor_embed(torch.cat([context.to(dtype), targets.to(dtype)]))
            tokens = both[: len(context)]
            groups = both[len(context) :].split([len(m.target_ids) for m in masks])
            queries = torch.cat(
                [
                    noised_targets(group, m.target_packing, self.draw_noise(m)).to(dtype)
                    for group, m in zip(groups, masks, strict=True)
                ]
            )
        else:
            raise ValueError(
                "a predictor without mask tokens (model.use_mask_tokens=false) starts from noised "
                "targets; give it the target features"
            )
        if self.cfg.modality_embedding:
            kinds = [self.img_mod_embed if image else self.video_mod_embed for image in images or [False] * len(masks)]
            tokens = _add_to_groups(tokens, kinds, [len(m.context_ids) for m in masks])
            queries = _add_to_groups(queries, kinds, [len(m.target_ids) for m in masks])
        ids, grid = join_ids(
            [*(m.context_ids for m in masks), *(m.target_ids for m in masks)], [m.grid for m in masks] * 2
        )
        if self.predictor_pos_embed is not None:
            for m in masks:
                if tuple(m.grid[1:]) != self.grid[1:] or m.grid[0] > self.grid[0]:
                    raise ValueError(
                        f"the predictor's positions are for at most {self.grid} tokens, the masks have "
                        f"{tuple(m.grid)}; use RoPE (model.use_rope=true) for other sizes"
                    )
            table = self.predictor_pos_embed[0].to(dtype)
            places = F.embedding(ids, table)
            tokens, queries = tokens + places[: len(tokens)], queries + places[len(tokens) :]
        layout = _Interleave(masks, context.device)
        x = permute_rows(torch.cat([tokens, queries]), layout.order, layout.inverse)
        rope = None
        if self.cfg.use_rope:
            rope = make_rope(ids[layout.order], grid, self.cfg.pred_embed_dim // self.num_heads, dtype, self.cfg)
        wanted = layout.inverse[len(tokens) :] if targets_only else None
        stream = run_blocks(self.predictor_blocks, x, layout.packing, rope, self.cfg.checkpointing, wanted)
        [(x, branch)] = deque(stream, maxlen=1)
        normed = apply_norm(self.predictor_norm, x, branch)
        if targets_only:
            return normed, 0
        return permute_rows(normed, layout.inverse, layout.order), len(tokens)

    def draw_noise(self, masks: MaskBatch) -> Noise:
        """What is added to the targets of a group, new at every call, from torch's generator of the device."""
        return Noise.draw(masks.target_packing, len(masks.target_ids), self.cfg.pred_embed_dim, masks.device)

    def _queries(self, masks: Sequence[MaskBatch], mask_tokens: Sequence[int] | None) -> list[Tensor]:
        """For each group, the mask token of every target token, [K', P]."""
        stack = [token[0].to(self.dtype) for token in self.mask_tokens]
        if mask_tokens is None:
            if self.cfg.mask_token_by == "mask":
                return [_by_mask(stack, m) for m in masks]
            mask_tokens = [place if m.mask_token is None else m.mask_token for place, m in enumerate(masks)]
        return [
            stack[index % len(stack)].expand(len(m.target_ids), -1) for index, m in zip(mask_tokens, masks, strict=True)
        ]


class _Activation(nn.Module):
    """GELU (erf) or SiLU, between the two layers that embed features of several depths."""

    def __init__(self, silu: bool) -> None:
        super().__init__()
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.silu else gelu(x)


def _add_to_groups(x: Tensor, vectors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """One vector, [1, 1, P], to all rows of each group."""
    parts = [part + vector[0].to(x.dtype) for part, vector in zip(x.split(list(sizes)), vectors, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_mask(tokens: list[Tensor], masks: MaskBatch) -> Tensor:
    """Mask token i % (number of tokens), each [1, P], for the targets of mask i: [K', P]."""
    size, chosen = len(masks.target_ids), [tokens[i % len(tokens)] for i in range(masks.num_masks)]
    if not masks.target_packing.dynamic:
        b = masks.batch_size
        totals = [sum(masks.target_lengths[i * b : (i + 1) * b]) for i in range(masks.num_masks)]
        # What lies behind the last sequence is never read.
        totals[-1] += size - sum(totals)
        return torch.cat([token.expand(total, -1) for token, total in zip(chosen, totals, strict=True)])
    mask_of_row = sequence_of_rows(masks.cu_seqlens_target, size) // masks.batch_size
    # Not a gather: its backward adds up in an order of its own at every run.
    parts = [(mask_of_row == i)[:, None].to(token.dtype) * token for i, token in enumerate(chosen)]
    return torch.stack(parts).sum(0)


class _Interleave:
    """Order that puts each sequence's context and target tokens side by side, worked out where the tokens are.

    order: rows of [all contexts; all targets] in packed order; inverse: the other way. Tokens behind the sums of the
    lengths (masks with a capacity) come behind all sequences.
    """

    def __init__(self, masks: Sequence[MaskBatch], device: torch.device) -> None:
        self.packing = concatenate([m.packing for m in masks])
        context = concatenate([m.context_packing for m in masks]).cu_seqlens
        target = concatenate([m.target_packing for m in masks]).cu_seqlens
        sizes = [sum(len(m.context_ids) for m in masks), sum(len(m.target_ids) for m in masks)]
        # How far the tokens of each sequence move. What lies behind is one sequence more, that begins at the totals.
        begin = self.packing.cu_seqlens
        shift = begin - context
        lengths = torch.cat([context.diff(), sizes[0] - context[-1:]])
        moved = [
            offset.index_select(0, sequence_of_rows(own, size)) + torch.arange(size, device=device)
            for offset, own, size in zip((shift, begin + lengths - target), (context, target), sizes, strict=True)
        ]
        self.inverse = torch.cat(moved)
        self.order = torch.empty_like(self.inverse).scatter_(0, self.inverse, torch.arange(sum(sizes), device=device))
