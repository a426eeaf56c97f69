"""Multi-block 3-D masks from counter-based random numbers: the exact definition, in integers.

A mask covers a grid of T x H x W tokens (id = (t * H + h) * W + w). `num_blocks` blocks of one common size are placed
at random; the tokens in no block are the context, the others are the target. Everything is a pure function of
(seed, step, global sample number, group, mask); an implementation in another language that follows the lines below
gives the same bits. Random words come from vjepa_fast.rng (generator, key and counter layout are stated there).

Fixed point. A configured number x is turned into X = ceil(x * 2**24) once, on the host, by exact rational arithmetic
on the float64 value. A range [low, high] becomes LOW and SPAN = HIGH - LOW. All of them fit 32 bits, all products 64.

Block size, once for (step, group, mask): words r = philox(sample = 0, step, tag(MASK_SIZE, group, mask)).
    t: scale = LOW + (SPAN * r[0] >> 32);   t = max(1, T * scale >> 24)
    s: scale = LOW + (SPAN * r[1] >> 32);   s = max(1, H * W * scale >> 24)            (tokens of the block in a frame)
    a: ratio = LOW + (SPAN * r[2] >> 32)                                               (height over width)
    h = clamp((isqrt(s * ratio >> 22) + 1) >> 1, 1, H)       = round(sqrt(s * ratio)), halves up
    w = clamp((isqrt((s << 26) // ratio) + 1) >> 1, 1, W)    = round(sqrt(s / ratio)), halves up
    isqrt is the floor of the exact square root.

Block position, for (step, sample, group, mask, attempt, block): words
r = philox(sample, step, tag(MASK_POSITION, group, mask, attempt, block)).
    top = (H - h + 1) * r[0] >> 32;  left = (W - w + 1) * r[1] >> 32;  start = (T - t + 1) * r[2] >> 32

Context: tokens in no block whose frame is below max_context_frames. Redraw rule: attempt 0 first; while the context of
a sample is empty, all its blocks are drawn again with the next attempt, at most MAX_ATTEMPTS times in all. If the last
attempt is empty too, token 0 is the context. Target: every token that is not context.

The distribution is that of the reference's sampler (facebookresearch/vjepa2, src/masks/multiseq_multiblock3d.py);
there, sizes are rounded in float64 and positions come from the global generator of a worker process.

Dimension letters: S samples, N = T * H * W tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.rng import Stream, below, pack_tag, random_words

FRACTION_BITS = 24
MAX_ATTEMPTS = 32

Grid = tuple[int, int, int]


def fixed_point(value: float) -> int:
    """ceil(value * 2**24), exact."""
    return math.ceil(Fraction(value) * (1 << FRACTION_BITS))


@dataclass(frozen=True)
class BlockSpec:
    """A MaskSpec in integers, for one grid."""

    num_blocks: int
    temporal: tuple[int, int]
    """LOW and SPAN of the temporal scale; likewise spatial and aspect."""
    spatial: tuple[int, int]
    aspect: tuple[int, int]
    max_context_frames: int

    @classmethod
    def from_config(cls, spec: MaskSpec, grid: Grid) -> BlockSpec:
        """Args: spec: the configured mask. grid: (T, H, W) in tokens."""

        def low_and_span(bounds: tuple[float, float]) -> tuple[int, int]:
            low, high = (fixed_point(bound) for bound in bounds)
            return low, high - low

        return cls(
            num_blocks=spec.num_blocks,
            temporal=low_and_span(spec.temporal_scale),
            spatial=low_and_span(spec.spatial_scale),
            aspect=low_and_span(spec.aspect_ratio),
            max_context_frames=max(1, int(grid[0] * spec.max_temporal_keep)),
        )


def block_size(spec: BlockSpec, grid: Grid, *, seed: int, step: int, group: int = 0, mask: int = 0) -> Grid:
    """Frames, height and width of every block of one mask in one step, in tokens."""
    num_frames, height, width = grid
    words = random_words(seed, 0, step, pack_tag(Stream.MASK_SIZE, group=group, mask=mask))
    temporal, spatial, aspect = (
        low + (span * int(word) >> 32)
        for (low, span), word in zip((spec.temporal, spec.spatial, spec.aspect), words, strict=False)
    )
    t = max(1, num_frames * temporal >> FRACTION_BITS)
    s = max(1, height * width * spatial >> FRACTION_BITS)
    h = (math.isqrt(s * aspect >> (FRACTION_BITS - 2)) + 1) >> 1
    w = (math.isqrt((s << (FRACTION_BITS + 2)) // aspect) + 1) >> 1
    return min(t, num_frames), min(max(h, 1), height), min(max(w, 1), width)


def mask_sample_ref(
    spec: BlockSpec, grid: Grid, sample_ids: np.ndarray, *, seed: int, step: int, group: int = 0, mask: int = 0
) -> np.ndarray:
    """Context of each sample before any truncation.

    Args:
        spec: the mask in integers.
        grid: (T, H, W) in tokens.
        sample_ids: [S] global sample numbers.
        seed, step: of the run.
        group: which frames-per-clip group, in the order of the configuration.
        mask: which mask, in the order of the configuration.

    Returns:
        [S, N] bool, true where a token is context; every row has at least one.
    """
    num_frames, height, width = grid
    t, h, w = block_size(spec, grid, seed=seed, step=step, group=group, mask=mask)
    sample_ids = np.asarray(sample_ids, dtype=np.uint64)
    context = np.zeros((len(sample_ids), num_frames, height, width), dtype=bool)
    pending = np.arange(len(sample_ids))
    frames, rows, columns = np.arange(num_frames), np.arange(height), np.arange(width)
    for attempt in range(MAX_ATTEMPTS):
        if not len(pending):
            break
        tags = [
            pack_tag(Stream.MASK_POSITION, group=group, mask=mask, attempt=attempt, block=block)
            for block in range(spec.num_blocks)
        ]
        words = random_words(seed, sample_ids[pending, None], step, np.array(tags)[None, :])
        top = below(words[..., 0], height - h + 1)[..., None]
        left = below(words[..., 1], width - w + 1)[..., None]
        start = below(words[..., 2], num_frames - t + 1)[..., None]
        in_t = (frames >= start) & (frames < start + t)
        in_h = (rows >= top) & (rows < top + h)
        in_w = (columns >= left) & (columns < left + w)
        covered = np.zeros((len(pending), num_frames, height, width), dtype=bool)
        for block in range(spec.num_blocks):
            covered |= (
                in_t[:, block, :, None, None] & in_h[:, block, None, :, None] & in_w[:, block, None, None, :]
            )
        drawn = ~covered
        drawn[:, spec.max_context_frames :] = False
        context[pending] = drawn
        pending = pending[~drawn.any(axis=(1, 2, 3))]
    context[pending, 0, 0, 0] = True
    return context.reshape(len(sample_ids), -1)
