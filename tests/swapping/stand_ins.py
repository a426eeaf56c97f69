"""Small modules with the class, attribute and parameter names of Meta's code, written for these tests.

They do by the shortest code what the reference's do, one mask at a time, so that the swap can be checked without a
checkout. `V1` and `V2` hold the classes of facebookresearch/jepa and facebookresearch/vjepa2, `V21` those of its
app/vjepa_2_1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH, FRAMES, TUBELET = 24, 8, 8, 2
GRID = (FRAMES // TUBELET, SIDE // PATCH, SIDE // PATCH)
NUM_TOKENS = math.prod(GRID)
WIDTH, DEPTH, HEADS = 48, 2, 3
PRED_WIDTH, PRED_DEPTH, PRED_HEADS = 32, 2, 2


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 88
        self.fc1, self.fc2, self.act = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.SiLU()
        self.fc3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


def rotate(x: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, N, d] turned by positions [B, 1, N]; the angles tiled over the pairs as V-JEPA 2 does, or one a pair."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.use_sdpa = num_heads, (dim // num_heads) ** -0.5, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.interpolate_rope, self.n_registers, self.has_cls_first = False, 0, False

    def forward(self, x: Tensor, places: list[Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if places is not None:
            part = 2 * (q.shape[-1] // 6)
            for axis, positions in enumerate(places):
                if self.interpolate_rope and axis > 0:
                    positions = positions * (256 // PATCH - 1) / (GRID[axis] - 1)
                q, k = (
                    torch.cat(
                        [
                            t[..., : axis * part],
                            rotate(t[..., axis * part : (axis + 1) * part], positions[:, None], self.interpolate_rope),
                            t[..., (axis + 1) * part :],
                        ],
                        -1,
                    )
                    for t in (q, k)
                )
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(-2))


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, silu: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: nn.Module = SwiGLUFFN(dim) if silu else MLP(dim)

    def forward(self, x: Tensor, places: list[Tensor] | None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), places))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed3D(nn.Module):
    def __init__(self, tubelet: int = TUBELET) -> None:
        super().__init__()
        kernel = (tubelet, PATCH, PATCH)
        self.proj = nn.Conv3d(3, WIDTH, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


def pick(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def axes(ids: Tensor) -> list[Tensor]:
    _, height, width = GRID
    return [ids // (height * width), ids % (height * width) // width, ids % width]


class _Encoder(nn.Module):
    def __init__(self, rope: bool, silu: bool, drop_path: float) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.out_layers = WIDTH, HEADS, None
        self.patch_size, self.num_frames, self.tubelet_size, self.is_video = PATCH, FRAMES, TUBELET, True
        self.patch_embed = PatchEmbed3D()
        self.pos_embed = None if rope else nn.Parameter(torch.randn(1, NUM_TOKENS, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, silu, drop_path) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor, masks: Tensor | list[Tensor] | None = None) -> Any:
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed[:, : x.shape[1]]
        ids = torch.arange(x.shape[1]).expand(len(x), -1)
        if masks is not None:
            ids = torch.cat([masks] if isinstance(masks, Tensor) else masks)
            x = pick(x.repeat(len(ids) // len(x), 1, 1), ids)
        outs = []
        for index, block in enumerate(self.blocks):
            x = block(x, axes(ids) if self.pos_embed is None else None)
            if self.out_layers is not None and index in self.out_layers:
                outs.append(self.norm(x))
        return self.norm(x) if self.out_layers is None else outs


def noised(x: Tensor) -> Tensor:
    """Features with noise of a level drawn for each clip."""
    kept = torch.cumprod(0.5 - torch.arange(1000, dtype=torch.float64) / 2000, 0)
    level = kept[torch.randint(0, 1000, (len(x),))][:, None, None].to(x.dtype)
    return level.sqrt() * F.layer_norm(x, x.shape[-1:]) + (1 - level).sqrt() * torch.randn(x.shape)


class _Predictor(nn.Module):
    def __init__(self, rope: bool, silu: bool, num_mask_tokens: int) -> None:
        super().__init__()
        self.patch_size, self.num_frames, self.tubelet_size, self.is_video = PATCH, FRAMES, TUBELET, True
        self.num_mask_tokens = num_mask_tokens
        self.predictor_embed = nn.Linear(WIDTH, PRED_WIDTH)
        self.mask_tokens = (
            None
            if num_mask_tokens == 0
            else nn.ParameterList(torch.randn(1, 1, PRED_WIDTH) for _ in range(num_mask_tokens))
        )
        self.predictor_pos_embed = (
            None if rope else nn.Parameter(torch.randn(1, NUM_TOKENS, PRED_WIDTH), requires_grad=False)
        )
        self.predictor_blocks = nn.ModuleList(Block(PRED_WIDTH, PRED_HEADS, silu) for _ in range(PRED_DEPTH))
        self.predictor_norm = nn.LayerNorm(PRED_WIDTH, eps=1e-6)
        self.predictor_proj = nn.Linear(PRED_WIDTH, WIDTH)

    def run(self, x: Tensor, context: Tensor, target: Tensor, mask_index: int, features: Any = None) -> Tensor:
        if self.mask_tokens is None:
            queries = noised(self.predictor_embed(features))
        else:
            queries = self.mask_tokens[mask_index % self.num_mask_tokens].expand(*target.shape, -1)
        x = torch.cat([self.predictor_embed(x), queries], 1)
        ids = torch.cat([context, target], 1)
        if self.predictor_pos_embed is not None:
            x = x + pick(self.predictor_pos_embed.expand(len(x), -1, -1), ids)
        for block in self.predictor_blocks:
            x = block(x, axes(ids) if self.predictor_pos_embed is None else None)
        return self.predictor_proj(self.predictor_norm(x)[:, context.shape[1] :])


class V1:
    class VisionTransformer(_Encoder):
        def __init__(self) -> None:
            super().__init__(False, False, 0.0)
            self.input_size = SIDE

    class VisionTransformerPredictor(_Predictor):
        def __init__(self, num_mask_tokens: int) -> None:
            super().__init__(False, False, num_mask_tokens)
            self.input_size = SIDE

        def forward(self, ctxt: Tensor, tgt: Any, masks_ctxt: Any, masks_tgt: Any, mask_index: int = 1) -> Tensor:
            return self.run(ctxt, masks_ctxt, masks_tgt, mask_index, tgt)

    class MultiMaskWrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor, masks: Any = None) -> Any:
            return self.backbone(x) if masks is None else [self.backbone(x, masks=mask) for mask in masks]

    class PredictorMultiMaskWrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, ctxt: Any, tgt: Any, masks_ctxt: Any, masks_tgt: Any) -> Any:
            rows = enumerate(zip(ctxt, tgt, masks_ctxt, masks_tgt, strict=True))
            return [self.backbone(*row, mask_index=i) for i, row in rows]


class V2:
    class VisionTransformer(_Encoder):
        def __init__(self, rope: bool = True, silu: bool = False, drop_path: float = 0.0) -> None:
            super().__init__(rope, silu, drop_path)
            self.img_height, self.img_width, self.use_rope = SIDE, SIDE, rope
            self.handle_nonsquare_inputs, self.use_activation_checkpointing = True, False

    class VisionTransformerPredictor(_Predictor):
        def __init__(self, num_mask_tokens: int = 4, rope: bool = True, silu: bool = False) -> None:
            super().__init__(rope, silu, num_mask_tokens)
            self.img_height, self.img_width, self.use_rope = SIDE, SIDE, rope
            self.return_all_tokens, self.chop_last_n_tokens, self.use_activation_checkpointing = False, 0, False

        def forward(self, x: Tensor, masks_x: Any, masks_y: Any, mask_index: int = 1, has_cls: bool = False) -> Tensor:
            return self.run(x, masks_x, masks_y, mask_index)

    class MultiSeqWrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Any, masks: Any = None) -> Any:
            if masks is None:
                return [self.backbone(clips) for clips in x]
            return [[self.backbone(clips, masks=mask) for mask in group] for clips, group in zip(x, masks, strict=True)]

    class PredictorMultiSeqWrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Any, masks_x: Any, masks_y: Any, has_cls: bool = False) -> Any:
            return [
                [self.backbone(*row, mask_index=i, has_cls=has_cls) for row in zip(*group, strict=True)]
                for i, group in enumerate(zip(x, masks_x, masks_y, strict=True))
            ]


class V21:
    class VisionTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_dim, self.num_heads, self.out_layers, self.use_rope = WIDTH, HEADS, None, True
            self.patch_size, self.num_frames, self.tubelet_size, self.is_video = PATCH, FRAMES, TUBELET, True
            self.img_height, self.img_width, self.handle_nonsquare_inputs = SIDE, SIDE, True
            self.use_activation_checkpointing, self.return_hierarchical, self.modality_embedding = False, False, True
            self.img_temporal_dim_size = 1
            self.patch_embed, self.patch_embed_img = PatchEmbed3D(), PatchEmbed3D(1)
            self.blocks = nn.ModuleList(Block(WIDTH, HEADS, False) for _ in range(4))
            self.hierarchical_layers = self.out_layers_distillation = [0, 1, 2, 3]
            self.norms_block = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(4))
            self.img_mod_embed = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.video_mod_embed = nn.Parameter(torch.randn(1, 1, WIDTH))
            interpolate(self.blocks)

        def forward(self, x: Tensor, masks: Tensor | None = None, training: bool = False) -> Any:
            if x.shape[2] == 1:
                x = self.patch_embed_img(x) + self.img_mod_embed
            else:
                x = self.patch_embed(x) + self.video_mod_embed
            ids = torch.arange(x.shape[1]).expand(len(x), -1) if masks is None else masks
            x, outs = pick(x, ids), []
            for block, norm in zip(self.blocks, self.norms_block, strict=True):
                x = block(x, axes(ids))
                outs.append(norm(x))
            if self.out_layers is not None:
                return [outs[index] for index in self.out_layers]
            return torch.cat(outs, -1) if training or self.return_hierarchical else outs[-1]

    class VisionTransformerPredictor(_Predictor):
        def __init__(self, return_all_tokens: bool) -> None:
            super().__init__(True, False, 2)
            self.img_height, self.img_width, self.use_rope, self.modality_embedding = SIDE, SIDE, True, True
            self.chop_last_n_tokens, self.use_activation_checkpointing = 0, False
            self.return_all_tokens, self.hierarchical_layers = return_all_tokens, [0, 1, 2, 3]
            self.predictor_embed = nn.Sequential(  # type: ignore[assignment]
                nn.Linear(4 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, PRED_WIDTH)
            )
            self.predictor_proj = nn.Linear(PRED_WIDTH, 4 * WIDTH)
            if return_all_tokens:
                self.predictor_proj_context = nn.Linear(PRED_WIDTH, 4 * WIDTH)
            self.video_mod_embed = nn.Parameter(torch.randn(1, 1, PRED_WIDTH))
            self.img_mod_embed = nn.Parameter(torch.randn(1, 1, PRED_WIDTH))
            interpolate(self.predictor_blocks)

        def forward(self, x: Tensor, masks_x: Any, masks_y: Any, mod: str = "video", mask_index: int = 1) -> Any:
            queries = self.mask_tokens[mask_index % 2].expand(*masks_y.shape, -1)
            x, ids = torch.cat([self.predictor_embed(x), queries], 1), torch.cat([masks_x, masks_y], 1)
            x = x + (self.img_mod_embed if mod == "image" else self.video_mod_embed)
            for block in self.predictor_blocks:
                x = block(x, axes(ids))
            context, target = self.predictor_norm(x).split([masks_x.shape[1], masks_y.shape[1]], 1)
            return self.predictor_proj(target), self.predictor_proj_context(context) if self.return_all_tokens else None

    class MultiSeqWrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Any, masks: Any = None, gram_mode: bool = False, training_mode: bool = False) -> Any:
            if masks is None:
                return [self.backbone(clips, training=training_mode) for clips in x]
            return [
                [self.backbone(clips, masks=mask, training=training_mode) for mask in group]
                for clips, group in zip(x, masks, strict=True)
            ]

    class PredictorMultiSeqWrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Any, masks_x: Any, masks_y: Any, mod: str = "video") -> Any:
            both = [
                [self.backbone(*row, mask_index=i, mod=mod) for row in zip(*group, strict=True)]
                for i, group in enumerate(zip(x, masks_x, masks_y, strict=True))
            ]
            return tuple([[pair[part] for pair in group] for group in both] for part in (0, 1))


def interpolate(blocks: nn.ModuleList) -> None:
    for block in blocks:
        block.attn.interpolate_rope = True


def randomise(*modules: nn.Module) -> None:
    """Nothing stays at 0 or 1."""
    for module in modules:
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def make_masks(batch_size: int, num_frames: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Two masks of different lengths, as (context, target) index lists."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = GRID[1] * GRID[2] * max(1, num_frames // TUBELET)
    context, target = [], []
    for kept, wanted in ((5, 4), (6, 3)):
        order = torch.rand(batch_size, num_tokens, generator=generator).argsort(1)
        context.append(order[:, :kept].sort(1).values)
        target.append(order[:, kept : kept + wanted].sort(1).values)
    return context, target


def make_clips(batch_size: int, num_frames: int = FRAMES) -> Tensor:
    return torch.randn(batch_size, 3, num_frames, SIDE, SIDE)
