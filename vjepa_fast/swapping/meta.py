"""Swaps live modules of Meta's code: facebookresearch/jepa (V-JEPA 1) and facebookresearch/vjepa2.

The reference is not imported: classes are known by their names and attributes. What an encoder or predictor can do that
ours cannot is refused when it is swapped, with one message that names all of it.

Legend: B clips, K context tokens, K' target tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.common.errors import UserError
from vjepa_fast.masking.batch import Grid
from vjepa_fast.models.layers import Block
from vjepa_fast.models.positions import interpolate_table
from vjepa_fast.swapping.shared_parameters import (
    EncoderView,
    Fast,
    FastNetwork,
    View,
    class_of,
    config_of,
    is_watched,
    pack,
    unpack,
)


def _crop(module: Any) -> tuple[int, int]:
    """Height and width that the module was made for, in pixels; V-JEPA 1 has one number for both."""
    if hasattr(module, "img_height"):
        return module.img_height, module.img_width
    return module.input_size, module.input_size


def _is_v1(module: nn.Module) -> bool:
    return not hasattr(module, "img_height")


def sizes_of(module: Any, blocks: nn.ModuleList) -> dict[str, Any]:
    """What ModelConfig calls the sizes that encoder and predictor share.

    Raises:
        UserError: options of the blocks that ours do not have.
    """
    refuse(module, {what for block in blocks for what in _unusual(block)})
    return {
        "model_name": "vit_tiny",
        "crop_size": _crop(module),
        "num_frames": module.num_frames,
        "patch_size": module.patch_size,
        "tubelet_size": module.tubelet_size,
        "use_rope": getattr(module, "use_rope", False),
        "wide_silu": False,
        "rope_precision": "reference",
    }


def refuse(module: nn.Module, wrong: set[str]) -> None:
    """Raises UserError if there is anything that ours cannot do."""
    if wrong:
        raise UserError(
            f"swap: this {class_of(module).__name__} has {', '.join(sorted(wrong))}, which vjepa-fast's "
            "does not have; leave it out of the call"
        )


def _unusual(block: Any) -> list[str]:
    """Options of a block of theirs that ours do not have."""
    attention, mlp, found = block.attn, block.mlp, []
    for name in ("attn_drop", "proj_drop"):
        if getattr(attention, name).p > 0:
            found.append(f"{name}={getattr(attention, name).p:g}")
    if hasattr(mlp, "drop") and mlp.drop.p > 0:
        found.append(f"dropout {mlp.drop.p:g} in the MLP")
    if getattr(attention, "is_causal", False):
        found.append("causal attention")
    head_dim = attention.qkv.weight.shape[1] // attention.num_heads
    if not attention.use_sdpa and abs(attention.scale - head_dim**-0.5) > 1e-6 * head_dim**-0.5:
        found.append(f"qk_scale={attention.scale:g}")
    activation = mlp.act
    if not (
        isinstance(activation, nn.SiLU)
        if hasattr(mlp, "fc3")
        else isinstance(activation, nn.GELU) and activation.approximate == "none"
    ):
        found.append(f"{activation} in the MLP")
    return found


def copy_drop_paths(blocks: nn.ModuleList, others: nn.ModuleList) -> None:
    """Give our blocks the drop path rates of theirs."""
    for block, other in zip(blocks, others, strict=True):
        assert isinstance(block, Block)
        block.drop_path_rate = float(getattr(getattr(other, "drop_path", None), "drop_prob", 0.0) or 0.0)


class _MetaEncoderView(EncoderView):
    cuts = True
    """False: V-JEPA 1's rule for clips of fewer frames."""
    every_level: tuple[int, ...]
    """The depths whose features training uses; `levels` are those of the call at hand."""

    def _table(self, grid: Grid) -> Tensor | None:
        return (
            None
            if self.pos_embed is None
            else interpolate_table(self.pos_embed[0], self.grid, grid, self.is_video, self.cuts)
        )


class FastEncoder(FastNetwork):
    """Before VisionTransformer of V-JEPA 1 and 2."""

    def make_view(self) -> View:
        module: Any = self
        mlp = module.blocks[0].mlp
        channels = module.patch_embed.proj.weight.shape[1]
        refuse(self, {f"{channels} channels"} if channels != 3 else set())
        cfg = config_of(
            self,
            **sizes_of(module, module.blocks),
            **self.options(),
            embed_dim=module.embed_dim,
            depth=len(module.blocks),
            num_heads=module.blocks[0].attn.num_heads,
            mlp_ratio=mlp.fc1.weight.shape[0] / module.embed_dim,
            use_silu=hasattr(mlp, "fc3"),
        )
        with torch.device("meta"):
            network = _MetaEncoderView(cfg)
        network.cuts = not _is_v1(self)
        network.every_level = network.levels
        copy_drop_paths(network.blocks, module.blocks)
        return View(self, network, None)

    def options(self) -> dict[str, Any]:
        """More of ModelConfig.

        Raises:
            UserError: something that ours lacks.
        """
        return {}

    def ready(self, clips: Sequence[Tensor], compiled: bool, every_level: bool = False) -> EncoderView | None:
        """The network for these clips, each [B, 3, T, H, W] or [B, 3, H, W]; None: theirs has to run.

        Args:
            clips: what it shall take.
            compiled: run the compiled parts of the blocks.
            every_level: of V-JEPA 2.1, return the features of all depths and not those of the last alone.
        """
        view = self.serves()
        if view is None:
            return None
        module: Any = self
        network = view.network
        assert isinstance(network, _MetaEncoderView)
        if any(self._is_unusual(x, network) for x in clips):
            return None
        network.out_layers = None if module.out_layers is None else list(module.out_layers)
        network.levels = network.every_level if every_level else network.every_level[-1:]
        view.refresh(module.blocks, getattr(module, "use_activation_checkpointing", False), compiled)
        return network

    def _is_unusual(self, x: Tensor, network: EncoderView) -> bool:
        """Whether theirs places the tokens of these clips in a way of its own, or refuses them."""
        if x.ndim != (5 if network.is_video else 4) or any(n % network.patch_size for n in x.shape[-2:]):
            return True
        if network.is_video and x.shape[2] != network.cfg.img_temporal_dim_size and x.shape[2] % network.tubelet_size:
            return True
        side = tuple(n // network.patch_size for n in x.shape[-2:])
        if network.cfg.use_rope:
            trained = network.grid[1]
            return not getattr(self, "handle_nonsquare_inputs", True) and side != (trained, trained)
        # Tables of images are scaled by the number of tokens, not by height and width.
        return not network.is_video and side[0] * network.grid[2] != side[1] * network.grid[1]

    @torch.compiler.disable
    def forward(self, x: Tensor, masks: Tensor | list[Tensor] | None = None) -> Any:
        """As the reference's: [B, N, D], or [M * B, K, D] with M masks; a list of these with `out_layers`."""
        network = self.ready([x], self._compiled_call_impl is not None)
        if network is None:
            return super().forward(x, masks)
        with network.casting(x.device):
            return network(x, masks)

    def encode(
        self,
        clips: Sequence[Tensor],
        masks: Sequence[Sequence[Tensor]] | None,
        compiled: bool,
        every_level: bool = False,
    ) -> list[list[Tensor]] | None:
        """All masks of all groups of clips in one pass; other arguments as `ready`.

        Returns:
            For each group and mask [B, K, D]; without masks for each group a list of one, [B, N, D]. None: one pass
            would not be the same.
        """
        if is_watched(self) or not clips or len({x.shape[-2:] for x in clips}) > 1:
            return None
        if masks is not None and (
            len(masks) != len(clips) or not all(are_ids(group, len(x)) for group, x in zip(masks, clips, strict=True))
        ):
            return None
        network = self.ready(clips, compiled, every_level)
        if network is None or network.out_layers is not None:
            return None
        with network.casting(clips[0].device):
            groups = [network.to_clips(x) for x in clips]
            grids = [network.grid_of(x) for x in groups]
            if masks is None:
                packed, _ = network.forward_packed(groups)
                shapes = [[(len(x), t * h * w)] for x, (t, h, w) in zip(groups, grids, strict=True)]
            else:
                batches = [pack(group, None, grid) for group, grid in zip(masks, grids, strict=True)]
                packed, _ = network.forward_packed(groups, batches)
                shapes = [[(len(ids), ids.shape[1]) for ids in group] for group in masks]
        return _regroup(unpack(packed, [shape for group in shapes for shape in group]), shapes)


def are_ids(group: Any, batch_size: int) -> bool:
    """Whether these are masks of a batch, at least one, as index lists [B, K]."""
    return (
        isinstance(group, list | tuple)
        and len(group) > 0
        and all(isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == batch_size for ids in group)
    )


def _regroup(flat: list[Tensor], like: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
    values = iter(flat)
    return [[next(values) for _ in group] for group in like]


class FastWrapper(Fast):
    """Before a wrapper that calls its backbone once for each mask."""

    backbone: nn.Module

    @property
    def compiled(self) -> bool:
        return self._compiled_call_impl is not None or self.backbone._compiled_call_impl is not None


class FastMultiSeq(FastWrapper):
    """Before MultiSeqWrapper of V-JEPA 2: lists over frames-per-clip groups, and over masks within."""

    @torch.compiler.disable
    def forward(self, x: Any, masks: Any = None) -> Any:
        """For each group [B, N, D]; with masks for each group and mask [B, K, D]."""
        found = None
        if isinstance(self.backbone, FastEncoder) and isinstance(x, list | tuple):
            found = self.backbone.encode(x, masks, self.compiled)
        if found is None:
            return super().forward(x, masks)
        return [group[0] for group in found] if masks is None else found


class FastMultiMask(FastWrapper):
    """Before MultiMaskWrapper of V-JEPA 1: a list over masks."""

    @torch.compiler.disable
    def forward(self, x: Tensor, masks: Any = None) -> Any:
        """[B, N, D]; with masks for each mask [B, K, D]."""
        found = None
        if isinstance(self.backbone, FastEncoder) and masks is not None:
            found = self.backbone.encode([x], [masks if isinstance(masks, list) else [masks]], self.compiled)
        return super().forward(x, masks) if found is None else found[0]
