"""Live predictors of facebookresearch/jepa (V-JEPA 1) and facebookresearch/vjepa2 on our networks; see meta.py.

Legend: B clips, K context tokens, K' target tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjepa_fast.masking.batch import Grid
from vjepa_fast.swapping.meta import FastWrapper, are_ids, copy_drop_paths, refuse, sizes_of
from vjepa_fast.swapping.shared_parameters import (
    FastNetwork,
    PredictorView,
    View,
    config_of,
    is_watched,
    pack,
    square_grid,
    unpack,
)


def _flat(features: Sequence[Tensor]) -> Tensor:
    """Of several [B, K, D] all tokens, [L, D]."""
    return torch.cat([x.flatten(0, 1) for x in features])


Row = tuple[int, Tensor, Tensor, Tensor]
"""Of one mask of one group: which mask token, modulo their number; [B, K, D] context features; int64 [B, K] and
[B, K'] ids of the context tokens and of those to predict."""


class Predictions(NamedTuple):
    """For each pair of group and mask."""

    targets: list[Tensor]
    """[B, K', D]."""
    contexts: list[Tensor] | None
    """[B, K, D], where V-JEPA 2.1's second head is."""


class FastPredictorBase(FastNetwork):
    """Before VisionTransformerPredictor."""

    takes_targets = False
    """Without mask tokens, the targets are given to it and begin as noise."""

    def make_view(self) -> View:
        module: Any = self
        blocks = module.predictor_blocks
        self.check()
        width, embed_dim = self.widths()
        cfg = config_of(
            self,
            **sizes_of(module, blocks),
            **self.options(),
            embed_dim=embed_dim,
            num_heads=1,
            pred_embed_dim=width,
            pred_depth=len(blocks),
            pred_num_heads=blocks[0].attn.num_heads,
            num_mask_tokens=len(module.mask_tokens or ()) or None,
            use_mask_tokens=module.mask_tokens is not None,
            use_pred_silu=hasattr(blocks[0].mlp, "fc3"),
        )
        with torch.device("meta"):
            network = PredictorView(cfg)
        copy_drop_paths(network.predictor_blocks, blocks)
        return View(self, network, None)

    def check(self) -> None:
        """Raises UserError for something that ours lacks."""
        module: Any = self
        wrong = {name for name in ("return_all_tokens", "chop_last_n_tokens") if getattr(module, name, False)}
        if module.mask_tokens is None and not self.takes_targets:
            wrong.add("use_mask_tokens=false")
        refuse(self, wrong)

    def widths(self) -> tuple[int, int]:
        """Widths of the predictor and of the encoder."""
        width, embed_dim = self.get_parameter("predictor_embed.weight").shape
        return width, embed_dim

    def options(self) -> dict[str, Any]:
        """More of ModelConfig."""
        return {}

    def predict(
        self, rows: Sequence[Row], compiled: bool, targets: Sequence[Tensor] | None = None, image: bool = False
    ) -> Predictions | None:
        """All masks of all groups in one pass.

        Args:
            rows: a pair of group and mask each.
            compiled: run the compiled parts of the blocks.
            targets: for each pair [B, K', D]; looked at without mask tokens.
            image: whether the tokens are of images; looked at in V-JEPA 2.1.

        Returns:
            None: one pass would not be the same.
        """
        fits = len(rows) > 0 and all(
            isinstance(x, Tensor) and x.ndim == 3 and are_ids([enc, pred], len(x)) and enc.shape == x.shape[:2]
            for _, x, enc, pred in rows
        )
        view = self.serves() if fits else None
        if view is None:
            return None
        module: Any = self
        network = view.network
        assert isinstance(network, PredictorView)
        view.refresh(module.predictor_blocks, getattr(module, "use_activation_checkpointing", False), compiled)
        tokens, contexts, context_ids, target_ids = (list(column) for column in zip(*rows, strict=True))
        grid = self._grid(network, [*context_ids, *target_ids])
        with network.casting(contexts[0].device):
            masks = [pack([enc], [pred], grid) for enc, pred in zip(context_ids, target_ids, strict=True)]
            images, of_context = [image] * len(masks), None
            if network.cfg.return_all_tokens:
                packed, of_context = network.forward_packed_all(_flat(contexts), masks, tokens, images)
            else:
                joined = None if targets is None or network.cfg.use_mask_tokens else _flat(targets)
                packed = network.forward_packed(_flat(contexts), masks, tokens, joined, images)
        return Predictions(
            unpack(packed, [(len(ids), ids.shape[1]) for ids in target_ids]),
            None if of_context is None else unpack(of_context, [(len(ids), ids.shape[1]) for ids in context_ids]),
        )

    def _grid(self, network: PredictorView, ids: Sequence[Tensor]) -> Grid:
        """What ids are counted on: with RoPE squares of the trained height, and as many of them as are needed."""
        if not network.cfg.use_rope:
            return network.grid
        num_frames, height, width = network.grid
        return square_grid(ids, num_frames * height * width, height)


class FastPredictor(FastPredictorBase):
    """Before VisionTransformerPredictor of V-JEPA 2."""

    @torch.compiler.disable
    def forward(self, x: Tensor, masks_x: Any, masks_y: Any, mask_index: int = 1, has_cls: bool = False) -> Any:
        """Args: x: [B, K, D]; masks_x, masks_y: int64 [B, K] and [B, K'], or lists of one. Returns [B, K', D]."""
        lists = [m if isinstance(m, list) else [m] for m in (masks_x, masks_y)]
        found = None
        if not has_cls and len(lists[0]) == len(lists[1]) == 1:
            found = self.predict([(mask_index, x, lists[0][0], lists[1][0])], self._compiled_call_impl is not None)
        return super().forward(x, masks_x, masks_y, mask_index, has_cls) if found is None else found.targets[0]


class FastPredictorV1(FastPredictorBase):
    """Before VisionTransformerPredictor of V-JEPA 1, which is also given the targets."""

    takes_targets = True

    @torch.compiler.disable
    def forward(self, ctxt: Tensor, tgt: Tensor, masks_ctxt: Any, masks_tgt: Any, mask_index: int = 1) -> Any:
        """As FastPredictor; tgt: [B, K', D], looked at without mask tokens."""
        lists = [m if isinstance(m, list) else [m] for m in (masks_ctxt, masks_tgt)]
        found = None
        if len(lists[0]) == len(lists[1]) == 1:
            row = mask_index, ctxt, lists[0][0], lists[1][0]
            found = self.predict([row], self._compiled_call_impl is not None, [tgt])
        return super().forward(ctxt, tgt, masks_ctxt, masks_tgt, mask_index) if found is None else found.targets[0]


class FastPredictorMultiSeq(FastWrapper):
    """Before PredictorMultiSeqWrapper of V-JEPA 2; the masks of a group share a mask token."""

    @torch.compiler.disable
    def forward(self, x: Any, masks_x: Any, masks_y: Any, has_cls: bool = False) -> Any:
        """For each group and mask [B, K', D]."""
        found = None
        if isinstance(self.backbone, FastPredictorBase) and not has_cls and not is_watched(self.backbone):
            rows = by_pair(x, masks_x, masks_y)
            found = self.backbone.predict(rows, self.compiled)
        if found is None:
            return super().forward(x, masks_x, masks_y, has_cls)
        return by_group(found.targets, rows, len(x))


def by_pair(x: Any, masks_x: Any, masks_y: Any) -> list[Row]:
    """Lists over groups and masks; the mask token of a group is its place."""
    # Both loops of theirs end with the shortest list.
    groups = enumerate(zip(x, masks_x, masks_y, strict=False))
    return [(group, *row) for group, lists in groups for row in zip(*lists, strict=False)]


def by_group(values: Sequence[Any], rows: Sequence[Row], num_groups: int) -> list[list[Any]]:
    """One value for each pair, in lists over groups and masks."""
    outputs: list[list[Any]] = [[] for _ in range(num_groups)]
    for (group, *_), value in zip(rows, values, strict=True):
        outputs[group].append(value)
    return outputs


class FastPredictorMultiMask(FastWrapper):
    """Before PredictorMultiMaskWrapper of V-JEPA 1; each mask has a mask token."""

    @torch.compiler.disable
    def forward(self, ctxt: Any, tgt: Any, masks_ctxt: Any, masks_tgt: Any) -> Any:
        """For each mask [B, K', D]."""
        lists = [value if isinstance(value, list) else [value] for value in (ctxt, tgt, masks_ctxt, masks_tgt)]
        found = None
        if isinstance(self.backbone, FastPredictorBase) and not is_watched(self.backbone):
            # As their loop, which ends with the shortest list.
            columns = list(zip(*lists, strict=False))
            rows = [(mask, z, enc, pred) for mask, (z, _, enc, pred) in enumerate(columns)]
            found = self.backbone.predict(rows, self.compiled, [target for _, target, _, _ in columns])
        return super().forward(ctxt, tgt, masks_ctxt, masks_tgt) if found is None else found.targets
