"""Draws masks over the frames of clips: context, predicted, and neither.

Sizes are in pixels of the PNG. The frames are put together in NumPy at their final size, a whole number of pixels for
each token, so that every token has sharp edges; matplotlib adds the text and writes the file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.config.mask_strategies import find_strategy
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.masking.batch import Grid, MaskBatch

NEITHER, CONTEXT, TARGET = 0, 1, 2
TARGET_COLOUR = (255, 176, 0)
"""Orange: apart from grey and from dark frames for colour-blind people too."""
MAX_COLUMNS = 8
MAX_ROWS = 192
"""Of a picture: matplotlib draws at most 65536 pixels in a direction."""
FORMATS = (".png", ".pdf", ".svg")

_DPI = 100
_MARGIN = 16
_LABELS = 252
_ROOM = 1400
_MAX_TILE = 232
_GAP = 6
_SAMPLE_GAP = 18
_MIN_WIDTH = 940
_LINE = 19
_TITLE_LINE = 32
_LEGEND = 40
_TINT = 0.65
_GREY = 205
_MIN_LINED = 6


def roles(masks: MaskBatch, mask: int, clip: int) -> np.ndarray:
    """uint8 [T, H, W]: CONTEXT, TARGET or NEITHER of every token of one mask of one clip."""
    one = masks.narrow(clip, clip + 1)
    out = np.full(one.num_tokens, NEITHER, dtype=np.uint8)
    for ids, lengths, role in (
        (one.context_ids, one.context_lengths, CONTEXT),
        (one.target_ids, one.target_lengths, TARGET),
    ):
        start = sum(lengths[:mask])
        out[ids[start : start + lengths[mask]].numpy()] = role
    return out.reshape(one.grid)


def mean_shares(masks: MaskBatch, mask: int) -> tuple[float, float]:
    """Context and target of one mask as shares of all tokens, mean over the clips."""
    own = slice(mask * masks.batch_size, (mask + 1) * masks.batch_size)
    total = masks.batch_size * masks.num_tokens
    return sum(masks.context_lengths[own]) / total, sum(masks.target_lengths[own]) / total


def describe(spec: MaskSpec) -> str:
    """A mask in a few words."""
    if spec.strategy == "multiblock":
        blocks = "block" if spec.num_blocks == 1 else "blocks"
        words = [f"{spec.num_blocks} {blocks} of {_range(spec.spatial_scale)}"]
        if spec.temporal_scale != (1.0, 1.0):
            words.append(f"time {_range(spec.temporal_scale)}")
    else:
        keys = find_strategy(spec.strategy).keys
        words = [f"{spec.strategy} {spec.ratio:g}" if "ratio" in keys else spec.strategy]
        if "temporal_probability" in keys:
            words.append(f"{spec.temporal_probability:g} temporal")
    if spec.max_temporal_keep < 1:
        words.append(f"max_temporal_keep {spec.max_temporal_keep:g}")
    if spec.max_keep is not None:
        words.append(f"max_keep {spec.max_keep}")
    for name in ("full_complement", "pred_full_complement", "inv_block"):
        if getattr(spec, name):
            words.append(name)
    return ", ".join(words)


def shares_text(context: float, target: float, num_tokens: int) -> str:
    """Shares in [0, 1] as the picture and the command line print them."""
    return f"context {100 * context:.1f} %, target {100 * target:.1f} % of {num_tokens} tokens"


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def columns_of(num_frames: int) -> list[int]:
    """The token frames that are drawn: all, or MAX_COLUMNS from the first to the last at even distances."""
    if num_frames <= MAX_COLUMNS:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)]


def token_size(grid: Grid) -> int:
    """Side of a token in the picture, pixels."""
    room = min(_MAX_TILE, _ROOM // min(MAX_COLUMNS, grid[0]) - _GAP)
    return max(1, room // max(grid[1:]))


def paint(frame: np.ndarray, role: np.ndarray) -> np.ndarray:
    """One frame under its mask: context as it is, target tinted, the rest grey.

    Args:
        frame: uint8 [H * k, W * k, 3].
        role: uint8 [H, W].

    Returns:
        uint8, of the shape of `frame`.
    """
    side = frame.shape[0] // role.shape[0]
    assert frame.shape[:2] == (role.shape[0] * side, role.shape[1] * side)
    wide = role.repeat(side, 0).repeat(side, 1)[..., None]
    # Rec. 709 luma: what is tinted or greyed out keeps a hint of its brightness and loses its colour.
    luma = (frame @ np.array([0.2126, 0.7152, 0.0722]))[..., None]
    tinted = _TINT * np.array(TARGET_COLOUR) + (1 - _TINT) * (0.3 * 255 + 0.7 * luma)
    grey = np.repeat(0.8 * _GREY + 0.2 * luma, 3, axis=-1)
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    # Hatched, so that it is no matter of colour alone.
    grey[(x + y) % 8 < 2] -= 45
    if side >= _MIN_LINED:
        tinted[(x % side == 0) | (y % side == 0)] *= 0.9
    painted = np.where(wide == TARGET, tinted, np.where(wide == CONTEXT, frame, grey))
    return (painted + 0.5).astype(np.uint8)


@dataclass
class Panel:
    """Clips of one frames-per-clip group.

    Attributes:
        masks: of the clips drawn, and of them only.
        names: what each mask is called.
        sample_ids: one for each clip.
        frames: for each clip uint8 [T, H * k, W * k, 3] with k = token_size(grid): one frame for each token frame.
        tubelet_size: frames of a token.
        heading: of the group; empty where there is one group.
    """

    masks: MaskBatch
    names: Sequence[str]
    sample_ids: Sequence[int]
    frames: Sequence[np.ndarray]
    tubelet_size: int
    heading: str = ""

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a frame."""
        side = token_size(self.masks.grid)
        return self.masks.grid[1] * side, self.masks.grid[2] * side

    @property
    def width(self) -> int:
        return len(columns_of(self.masks.grid[0])) * (self.tile[1] + _GAP) - _GAP

    @property
    def row_height(self) -> int:
        """A row has room for its label."""
        lines = max(len(textwrap.wrap(name, _LABELS // 8)) for name in self.names)
        return max(self.tile[0] + _GAP, (lines + 3) * _LINE + _GAP)

    @property
    def height(self) -> int:
        rows = len(self.sample_ids) * self.masks.num_masks
        return 2 * _LINE + rows * self.row_height + len(self.sample_ids) * _SAMPLE_GAP

    def tiles(self) -> list[tuple[int, int, int, int, int]]:
        """(clip, mask, token frame, y, x) of every frame drawn, from the panel's upper left corner."""
        return [
            (
                clip,
                mask,
                frame,
                2 * _LINE + (clip * self.masks.num_masks + mask) * self.row_height + clip * _SAMPLE_GAP,
                column * (self.tile[1] + _GAP),
            )
            for clip in range(len(self.sample_ids))
            for mask in range(self.masks.num_masks)
            for column, frame in enumerate(columns_of(self.masks.grid[0]))
        ]

    def canvas(self) -> np.ndarray:
        """uint8 [height, width, 3]: the frames, on white."""
        out = np.full((self.height, self.width, 3), 255, dtype=np.uint8)
        height, width = self.tile
        for clip, mask, frame, y, x in self.tiles():
            out[y : y + height, x : x + width] = paint(self.frames[clip][frame], roles(self.masks, mask, clip)[frame])
        return out


def picture_height(panels: Sequence[Panel], title: str, facts: Sequence[str]) -> int:
    """Of what `draw` makes, pixels."""
    return _header_height(title, facts, _width(panels)) + sum(panel.height for panel in panels) + _MARGIN


def _width(panels: Sequence[Panel]) -> int:
    return max(_MIN_WIDTH, _LABELS + max(panel.width for panel in panels) + 2 * _MARGIN)


def _wrap_title(title: str, width: int) -> list[str]:
    return textwrap.wrap(title, (width - 2 * _MARGIN) // 13)


def _wrap_facts(facts: Sequence[str], width: int) -> list[str]:
    return [line for fact in facts for line in textwrap.wrap(fact, (width - 2 * _MARGIN) // 8)]


def _header_height(title: str, facts: Sequence[str], width: int) -> int:
    lines = len(_wrap_title(title, width)) * _TITLE_LINE + len(_wrap_facts(facts, width)) * _LINE
    return _MARGIN + lines + _LEGEND


class _Sheet:
    """A figure addressed in pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def text(self, x: float, y: float, words: str, size: float = 10, **style: Any) -> None:
        # Names may hold a dollar sign, which is no formula here.
        self.figure.text(
            x / self.width, 1 - y / self.height, words, fontsize=size, parse_math=False, **{"va": "top", **style}
        )

    def image(self, x: int, y: int, pixels: np.ndarray) -> None:
        rows, columns = pixels.shape[:2]
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + rows) / self.height, columns / self.width, rows / self.height)
        )
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()


def draw(panels: Sequence[Panel], title: str, facts: Sequence[str], out: Path) -> None:
    """Draws the picture.

    Args:
        panels: from top to bottom.
        title: in large letters; long ones are wrapped, and so are facts.
        facts: one line each.
        out: file, whose ending is one of FORMATS.

    Raises:
        OSError: the file cannot be written.
    """
    sheet = _Sheet(_width(panels), picture_height(panels, title, facts))
    y = _MARGIN
    for line in _wrap_title(title, sheet.width):
        sheet.text(_MARGIN, y, line, 14, weight="bold")
        y += _TITLE_LINE
    for line in _wrap_facts(facts, sheet.width):
        sheet.text(_MARGIN, y, line)
        y += _LINE
    _draw_legend(sheet, y + 8)
    y = _header_height(title, facts, sheet.width)
    for panel in panels:
        _draw_panel(sheet, panel, y)
        y += panel.height
    sheet.figure.savefig(out, format=out.suffix[1:].lower(), dpi=_DPI)


def _draw_legend(sheet: _Sheet, y: int) -> None:
    # A frame with light and dark places shows what becomes of them.
    sample = np.repeat(np.linspace(60, 200, 32, dtype=np.uint8)[None, :, None], 16, axis=0)
    sample = (sample * np.array([0.6, 0.85, 1.0])).astype(np.uint8)
    x = _MARGIN
    for role, words in (
        (CONTEXT, "context: the encoder sees it"),
        (TARGET, "target: predicted from the context"),
        (NEITHER, "neither: cut off"),
    ):
        sheet.image(x, y, paint(sample, np.array([[role, role]], dtype=np.uint8)))
        sheet.text(x + 40, y, words)
        x += 40 + 8 * len(words) + 16


def _draw_panel(sheet: _Sheet, panel: Panel, top: int) -> None:
    left, tubelet = _MARGIN + _LABELS, panel.tubelet_size
    sheet.image(left, top, panel.canvas())
    if panel.heading:
        sheet.text(_MARGIN, top + _LINE // 2, panel.heading, 11, weight="bold")
    for clip, mask, frame, y, x in panel.tiles():
        if clip == mask == 0:
            first = frame * tubelet
            name = f"frame {first}" if tubelet == 1 else f"frames {first}-{first + tubelet - 1}"
            sheet.text(left + x + panel.tile[1] / 2, top + y - 5, name, 9, ha="center", va="bottom")
        if x == 0:
            _draw_label(sheet, panel, clip, mask, top + y)


def _draw_label(sheet: _Sheet, panel: Panel, clip: int, mask: int, y: int) -> None:
    masks = panel.masks.narrow(clip, clip + 1)
    context, target = (lengths[mask] / masks.num_tokens for lengths in (masks.context_lengths, masks.target_lengths))
    sheet.text(_MARGIN, y, f"sample {panel.sample_ids[clip]}, mask {mask}", weight="bold")
    for line in textwrap.wrap(panel.names[mask], _LABELS // 8):
        y += _LINE
        sheet.text(_MARGIN, y, line)
    for line in shares_text(context, target, masks.num_tokens).split(" of "):
        y += _LINE
        sheet.text(_MARGIN, y, line if line.startswith("context") else f"of {line}", color="0.35")
