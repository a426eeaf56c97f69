"""The encoder: a vision transformer over tubelets, run on packed sequences of kept tokens.

Legend: B clips, T frames, H W pixels, N tokens of a clip, K kept tokens, L tokens of all sequences, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.common.profiler_labels import label, label_backward
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.masking.batch import Grid, MaskBatch
from vjepa_fast.models.layers import init_weights, make_blocks, run_blocks
from vjepa_fast.models.positions import (
    SeparablePositions,
    add_positions,
    interpolate_table,
    interpolation_scale,
    sincos_table,
)
from vjepa_fast.models.sizes import level_blocks, size_of
from vjepa_fast.ops.layer_norm import LayerNorm
from vjepa_fast.ops.packing import Packing, concatenate
from vjepa_fast.ops.patch_embed import patch_embed
from vjepa_fast.ops.rope3d import Rope, join_ids

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(cfg: ModelConfig, parameter: Tensor) -> torch.dtype:
    """Half precision if configured, else whatever the parameters are (fp32, or fp64 after .double())."""
    wanted = COMPUTE_DTYPES[cfg.dtype]
    return parameter.dtype if wanted == torch.float32 else wanted


def make_rope(ids: Tensor, grid: Grid, head_dim: int, dtype: torch.dtype, cfg: ModelConfig) -> Rope:
    """The configured rotation of tokens with these ids on this grid."""
    assert cfg.patch_size is not None
    scale = interpolation_scale(grid, cfg.patch_size) if cfg.interpolate_rope else (1.0, 1.0, 1.0)
    return Rope(ids, grid, head_dim, dtype, cfg.rope_style, cfg.rope_precision, scale)


def apply_norm(norm: LayerNorm, x: Tensor, branch: Tensor | None) -> Tensor:
    """The norm of x + branch."""
    return norm(x) if branch is None else norm.add(x, branch)[1]


def modality_embedding(width: int) -> nn.Parameter:
    """[1, 1, width], as the reference begins it (facebookresearch/vjepa2 at 204698b, app/vjepa_2_1/models)."""
    return nn.Parameter(torch.empty(1, 1, width).normal_(std=1e-6))


def _side_by_side(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _all_ids(num_tokens: int, batch_size: int, device: torch.device) -> Tensor:
    return torch.arange(num_tokens, dtype=torch.int32, device=device).repeat(batch_size)


class PatchEmbed(nn.Module):
    """Holds the convolution whose kernel patch_embed multiplies with."""

    def __init__(self, patch_size: int, tubelet_size: int | None, dim: int) -> None:
        super().__init__()
        self.proj: nn.Conv2d | nn.Conv3d
        if tubelet_size is None:
            self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        else:
            kernel = (tubelet_size, patch_size, patch_size)
            self.proj = nn.Conv3d(3, dim, kernel_size=kernel, stride=kernel)

    def forward(
        self,
        clips: Tensor,
        rows: Tensor | None,
        dtype: torch.dtype,
        table: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Args and result as vjepa_fast.ops.patch_embed; `offset`, [D], is added to all tokens."""
        weight = self.proj.weight
        if weight.ndim == 4:
            weight = weight[:, :, None]
        bias = self.proj.bias
        assert bias is not None
        return patch_embed(clips, weight, bias if offset is None else bias + offset, rows, dtype, table)


class VisionTransformer(nn.Module):
    """V-JEPA's encoder. state_dict keys are those of the reference's VisionTransformer.

    With `cfg.n_output_distillation` it is that of V-JEPA 2.1, which has a norm after each quarter of its blocks and in
    training returns the features of the last so many of these depths side by side.

    Attributes:
        levels: numbers of the blocks whose features training uses, ascending.
        output_dim: their width side by side.
        before: called before what lies outside of the blocks is read; see Block.

    Args:
        cfg: crop_size, num_frames, patch_size and tubelet_size must be set.
        out_layers: block numbers; `forward` then returns the normed outputs of these blocks instead of the last.

    Raises:
        ConfigError: sizes that do not go together.
        ValueError: out_layers that the encoder does not have, or in V-JEPA 2.1 without a norm after them.
    """

    before: Callable[[], None] | None = None

    def __init__(self, cfg: ModelConfig, out_layers: Sequence[int] | None = None) -> None:
        super().__init__()
        if cfg.crop_size is None or cfg.num_frames is None or cfg.patch_size is None or cfg.tubelet_size is None:
            raise ConfigError("model.crop_size, num_frames, patch_size and tubelet_size must be set")
        size = size_of(cfg)
        self.cfg = cfg
        self.embed_dim, self.num_heads = size.embed_dim, size.num_heads
        self.patch_size = cfg.patch_size
        self.is_video = cfg.num_frames > 1
        self.tubelet_size = cfg.tubelet_size if self.is_video else 1
        self.out_layers = None if out_layers is None else list(out_layers)
        count = cfg.n_output_distillation
        self._normed_blocks = None if count is None else level_blocks(size.depth)
        self.levels = (size.depth - 1,) if self._normed_blocks is None else self._normed_blocks[-(count or 1) :]
        self.output_dim = len(self.levels) * self.embed_dim
        for index in self.out_layers or ():
            if not 0 <= index < size.depth:
                raise ValueError(f"out_layers holds {index}; the encoder has blocks 0 to {size.depth - 1}")
            self._check_normed(index)
        height, width = (side // self.patch_size for side in cfg.crop_size)
        self.grid: Grid = (cfg.num_frames // self.tubelet_size, height, width)
        self.patch_embed = PatchEmbed(self.patch_size, self.tubelet_size if self.is_video else None, self.embed_dim)
        self.patch_embed_img: PatchEmbed | None = None
        if cfg.img_temporal_dim_size is not None:
            self.patch_embed_img = PatchEmbed(self.patch_size, 1, self.embed_dim)
        self.pos_embed: nn.Parameter | None = None
        self.learned_positions: SeparablePositions | None = None
        if not cfg.use_rope and cfg.positions == "learned":
            self.learned_positions = SeparablePositions(self.embed_dim, self.grid)
        elif not cfg.use_rope:
            table = sincos_table(self.embed_dim, self.grid, cfg.uniform_power, self.is_video)
            self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = make_blocks(
            size.depth,
            size.embed_dim,
            size.num_heads,
            size.mlp_ratio,
            cfg.drop_path_rate,
            cfg.use_silu,
            cfg.wide_silu,
            cfg.attention,
            cfg.compile_model is True,
        )
        if self._normed_blocks is None:
            self.norm = LayerNorm(self.embed_dim, eps=1e-6)
        else:
            self.norms_block = nn.ModuleList(LayerNorm(self.embed_dim, eps=1e-6) for _ in self._normed_blocks)
        if cfg.modality_embedding:
            self.img_mod_embed = modality_embedding(self.embed_dim)
            self.video_mod_embed = modality_embedding(self.embed_dim)
        init_weights(self, self.blocks, cfg.init)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return compute_dtype(self.cfg, self.blocks[0].norm1.weight)  # type: ignore[arg-type,union-attr]

    @property
    def level_norms(self) -> list[LayerNorm]:
        """The norm of each of `levels`."""
        return [self._norm_after(index) for index in self.levels]

    def _check_normed(self, index: int) -> None:
        if self._normed_blocks is not None and index not in self._normed_blocks:
            raise ValueError(
                f"out_layers holds {index}; this encoder (V-JEPA 2.1) has norms after the blocks "
                f"{', '.join(map(str, self._normed_blocks))} only"
            )

    def _norm_after(self, index: int) -> LayerNorm:
        self._check_normed(index)
        norm = self.norm if self._normed_blocks is None else self.norms_block[self._normed_blocks.index(index)]
        assert isinstance(norm, LayerNorm)
        return norm

    def is_image(self, clips: Tensor) -> bool:
        """Whether [B, T, H, W, 3] clips are what cfg.img_temporal_dim_size says images are."""
        return clips.shape[1] == self.cfg.img_temporal_dim_size

    def to_clips(self, x: Tensor) -> Tensor:
        """Any accepted input as [B, T, H, W, 3].

        Accepts [B, T, H, W, 3] and [B, 3, T, H, W] clips, [B, H, W, 3] and [B, 3, H, W] images (a video model repeats
        an image over one tubelet, unless it has a patch embedding for images). uint8 is raw, float is normalised.

        Raises:
            ValueError: another shape, or sides that the patch or tubelet size does not divide.
        """
        if x.ndim in (4, 5) and x.shape[-1] != 3 and x.shape[1] == 3:
            x = x.movedim(1, -1)
        if x.ndim == 4:
            x = x[:, None].expand(-1, self.cfg.img_temporal_dim_size or self.tubelet_size, -1, -1, -1)
        if x.ndim != 5 or x.shape[-1] != 3:
            raise ValueError(f"clips have shape {list(x.shape)}; expected [B, T, H, W, 3] or [B, 3, T, H, W]")
        tubelet = 1 if self.is_image(x) else self.tubelet_size
        for name, value, unit in (
            ("frames", x.shape[1], tubelet),
            ("height", x.shape[2], self.patch_size),
            ("width", x.shape[3], self.patch_size),
        ):
            if value == 0 or value % unit:
                raise ValueError(f"clips have {name} {value}; expected a positive multiple of {unit}")
        return x

    def grid_of(self, clips: Tensor) -> Grid:
        """(T, H, W) in tokens of [B, T, H, W, 3] clips."""
        _, num_frames, height, width, _ = clips.shape
        tubelet = 1 if self.is_image(clips) else self.tubelet_size
        return num_frames // tubelet, height // self.patch_size, width // self.patch_size

    def forward(
        self, x: Tensor, masks: Tensor | list[Tensor] | None = None, training: bool = False
    ) -> Tensor | list[Tensor]:
        """Features of whole clips, or of kept tokens.

        Args:
            x: see to_clips.
            masks: int64 [B, K] token ids, or a list of M such tensors.
            training: of V-JEPA 2.1, the features of all `levels` side by side, as in training, and not of the last.

        Returns:
            [B, N, D], with masks [M * B, K, D] mask by mask; output_dim in place of D with `training`; a list of these
            with `out_layers`.
        """
        clips = self.to_clips(x)
        grid = self.grid_of(clips)
        batch_size, num_tokens = len(clips), grid[0] * grid[1] * grid[2]
        if masks is None:
            rows, ids = None, _all_ids(num_tokens, batch_size, clips.device)
            shape = (batch_size, num_tokens)
        else:
            joined = torch.cat([masks] if isinstance(masks, Tensor) else list(masks))
            clip_of_row = torch.arange(len(joined), device=joined.device) % batch_size
            rows, ids = (clip_of_row[:, None] * num_tokens + joined).flatten(), joined.flatten()
            shape = (len(joined), joined.shape[1])
        tokens = self._embed(clips, rows, grid)
        packing = Packing.uniform(*shape, clips.device)
        wanted = self.out_layers if self.out_layers is not None else self.levels if training else self.levels[-1:]
        outputs = [out.view(*shape, -1) for out in self._run(tokens, ids, grid, packing, wanted)]
        return outputs if self.out_layers is not None else _side_by_side(outputs)

    def forward_packed(
        self, clips: Sequence[Tensor], masks: Sequence[MaskBatch] | None = None, final_norm: bool = True
    ) -> tuple[Tensor, Packing]:
        """All masks of all clips of all frames-per-clip groups in one pass.

        Args:
            clips: for each group, [B_g, T_g, H, W, 3].
            masks: for each group; the context tokens are encoded. None: all tokens of all clips.
            final_norm: False: outputs of blocks, for a caller that applies `level_norms` to what it needs.

        Returns:
            [L, output_dim] features of all `levels` and how they are packed: group by group, mask by mask, clip by
            clip.
        """
        tokens, all_ids, grids, packings = [], [], [], []
        for index, group in enumerate(clips):
            grid = self.grid_of(group)
            if masks is None:
                num_tokens = grid[0] * grid[1] * grid[2]
                rows, ids = None, _all_ids(num_tokens, len(group), group.device)
                packings.append(Packing.uniform(len(group), num_tokens, group.device))
            else:
                batch = masks[index]
                rows, ids = batch.context_rows, batch.context_ids
                packings.append(batch.context_packing)
            tokens.append(self._embed(group, rows, grid))
            all_ids.append(ids)
            grids.append(grid)
        packing = concatenate(packings)
        outputs = self._run(torch.cat(tokens), *join_ids(all_ids, grids), packing, self.levels, final_norm)
        return _side_by_side(outputs), packing

    def _embed(self, clips: Tensor, rows: Tensor | None, grid: Grid) -> Tensor:
        if self.before is not None:
            self.before()
        embed, offset = self.patch_embed, None
        if self.is_image(clips):
            assert self.patch_embed_img is not None
            embed = self.patch_embed_img
        if self.cfg.modality_embedding:
            offset = (self.img_mod_embed if self.is_image(clips) else self.video_mod_embed).flatten()
        table = self._table(grid)
        # The kernel gives no gradient to a table.
        apart = table if table is not None and table.requires_grad else None
        with label("patch embedding"):
            tokens = embed(clips, rows, self.dtype, table if apart is None else None, offset)
            tokens = tokens if apart is None else add_positions(tokens, apart, rows)
            return label_backward(tokens, "patch embedding")

    def _table(self, grid: Grid) -> Tensor | None:
        """[T * H * W, D] positions that are added to the tokens of a clip; None: nothing is."""
        if self.learned_positions is not None:
            return interpolate_table(self.learned_positions(), self.grid, grid, self.is_video)
        return None if self.pos_embed is None else interpolate_table(self.pos_embed[0], self.grid, grid, self.is_video)

    def _run(
        self, x: Tensor, ids: Tensor, grid: Grid, packing: Packing, wanted: Sequence[int], final_norm: bool = True
    ) -> list[Tensor]:
        """Outputs of the blocks `wanted`, in their order, each by its norm if `final_norm`."""
        rope = None
        if self.cfg.use_rope:
            rope = make_rope(ids, grid, self.embed_dim // self.num_heads, self.dtype, self.cfg)
        outputs = []
        stream = run_blocks(self.blocks, x, packing, rope, self.cfg.checkpointing)
        for index, (x, branch) in enumerate(stream):
            if index not in wanted:
                continue
            if final_norm:
                outputs.append(self._norm(index, x, branch))
            else:
                outputs.append(x if branch is None else x + branch)
        return outputs

    def _norm(self, index: int, x: Tensor, branch: Tensor | None) -> Tensor:
        """The output x + branch of a block by its norm."""
        return apply_norm(self._norm_after(index), x, branch)
