"""Masks from counter-based random numbers: the exact definition, in integers, and the numbers of a configuration.

A mask covers a grid of T x H x W tokens (id = (t * H + h) * W + w); a frame has H * W places. A token is context (seen)
or target (predicted). Everything is a pure function of (seed, step, global sample number, group, mask);
an implementation in another language that follows the lines below gives the same bits, and csrc/mask_rules.h is one.
Random words come from vjepa_fast.common.rng (generator, key and counter layout are stated there).

Fixed point. A configured number x is turned into X = ceil(x * 2**24) once, on the host, by exact rational arithmetic
on the float64 value. A range [low, high] becomes LOW and SPAN = HIGH - LOW. All of them fit 32 bits, all products 64.

multiblock: `num_blocks` blocks of one common size are placed at random; their tokens are the target.

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

  Redraw rule: attempt 0 first; while the context of a sample (below) is empty, all its blocks are drawn again with the
  next attempt, at most MAX_ATTEMPTS times in all.

The other strategies predict the share `ratio`, with R its fixed point and
count(n) = min(n - 1, max(1, (n * R + 2**23) >> 24)) out of n, so that a single place or frame predicts nothing.

  tube: count(H * W) random places are the target, the same in every frame.
  patches: count(H * W) random places are the target, drawn anew for every frame.
  temporal: count(T) consecutive frames are the target, from start = (T - count(T) + 1) * r[0] >> 32.
  mixture: temporal if r[1] < P, else patches; P = ceil(temporal_probability * 2**32).
  future: the last count(T) frames are the target.
  r = philox(sample, step, tag(MASK_FRAMES, group, mask)). A random subset of k places: place i has the key
  word[i % 4] of philox(sample, step, tag(MASK_PATCHES, group, mask, attempt = frame (0 for tube), block = i // 4)), and
  the k places with the smallest (key, i) are taken. The tag bounds these: H * W <= 4096, and T <= 256 for patches and
  mixture. The reference's own tube (facebookresearch/jepa, src/masks/random_tube.py) keeps int(H * W * (1 - ratio))
  places, so it rounds the context down where this rounds the target to the nearest; for `round_context_down` R stands
  for the share of H * W that is left.

Context: tokens that are not target and whose frame is below max_context_frames; token 0 if that leaves none. Target:
every token that is not context.

Truncation, complement and swap, for each mask, in this order. With the lengths of a sample's context and target:
  1. truncation: both lengths become the smallest of the sample's truncation group;
  2. the context's is at most max_keep;
  3. the first ids up to the length are kept, and the others are neither context nor target, unless `full_complement`
     makes every token outside the context target, or `pred_full_complement` every token outside the target context;
  4. inv_block swaps the two, except where no token would be left to see.

The distribution of multiblock is that of the reference's sampler (facebookresearch/vjepa2,
src/masks/multiseq_multiblock3d.py); there, sizes are rounded in float64 and positions come from the global generator of
a worker process.

Dimension letters: B clips, M masks, S = M * B sequences (mask by mask), N = T * H * W tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.common.rng import Stream, below, pack_tag, random_words
from vjepa_fast.config.mask_strategies import MAX_PLACES, find_strategy
from vjepa_fast.config.schema import MaskSpec

FRACTION_BITS = 24
MAX_ATTEMPTS = 32
MAX_TOKENS = 1 << 18
"""Of a grid: what the bitmap of one mask may take of a GPU's shared memory."""
Complement = Literal["none", "full", "pred_full"]
COMPLEMENTS: dict[Complement, int] = {"none": 0, "full": 1, "pred_full": 2}
"""The numbers of csrc/mask_rules.h (enum Complement)."""

Grid = tuple[int, int, int]


def fixed_point(value: float | Fraction, bits: int = FRACTION_BITS) -> int:
    """ceil(value * 2**bits), exact."""
    return math.ceil(Fraction(value) * (1 << bits))


@dataclass(frozen=True)
class BlockSpec:
    """A MaskSpec in integers, for one grid."""

    NUM_INTS: ClassVar[int] = 14
    """Of to_ints."""

    strategy: str
    num_blocks: int
    temporal: tuple[int, int]
    """LOW and SPAN of the temporal scale; likewise spatial and aspect."""
    spatial: tuple[int, int]
    aspect: tuple[int, int]
    predicted: int
    """R."""
    temporal_below: int
    """P."""
    max_context_frames: int
    max_keep: int | None
    complement: Complement
    inv_block: bool
    config: MaskSpec = field(compare=False)
    """As it was configured, for a strategy that is drawn in Python only."""

    @classmethod
    def from_config(cls, spec: MaskSpec, grid: Grid) -> BlockSpec:
        """Args: spec: the configured mask. grid: (T, H, W) in tokens.

        Raises:
            ConfigError: the grid is too large, or the strategy is not there.
        """
        num_frames, height, width = grid
        num_tokens = num_frames * height * width
        if num_tokens > MAX_TOKENS:
            raise ConfigError(
                f"a clip of {num_frames} x {height} x {width} tokens has {num_tokens}; masks are drawn "
                f"for at most {MAX_TOKENS}. Use smaller or fewer frames, or larger patches"
            )
        try:
            strategy = find_strategy(spec.strategy)
        except ValueError as error:
            raise ConfigError(f"mask.masks: {error}") from None
        if strategy.max_places is not None and height * width > strategy.max_places:
            raise ConfigError(
                f"a frame of {height} x {width} tokens is too large for the mask strategy "
                f"{strategy.name}, which draws from at most {strategy.max_places} places"
            )
        if strategy.max_frames is not None and num_frames > strategy.max_frames:
            raise ConfigError(
                f"{num_frames} token frames are too many for the mask strategy {strategy.name}, which "
                f"draws for at most {strategy.max_frames}"
            )

        def low_and_span(bounds: tuple[float, float]) -> tuple[int, int]:
            low, high = (fixed_point(bound) for bound in bounds)
            return low, high - low

        ratio = Fraction(spec.ratio)
        if spec.round_context_down:
            places = height * width
            # In float64, as the reference has it: 196 * (1 - 0.5) and its like must round as there.
            ratio = Fraction(places - int(places * (1.0 - spec.ratio)), places)
        complement: Complement = "pred_full" if spec.pred_full_complement else "none"
        return cls(
            strategy=spec.strategy,
            num_blocks=spec.num_blocks,
            temporal=low_and_span(spec.temporal_scale),
            spatial=low_and_span(spec.spatial_scale),
            aspect=low_and_span(spec.aspect_ratio),
            predicted=fixed_point(ratio),
            temporal_below=fixed_point(spec.temporal_probability, 32),
            max_context_frames=max(1, int(num_frames * spec.max_temporal_keep)),
            max_keep=None if spec.max_keep is None else min(spec.max_keep, num_tokens),
            complement="full" if spec.full_complement else complement,
            inv_block=spec.inv_block,
            config=spec,
        )

    @property
    def number(self) -> int | None:
        """Of the strategy, for C++; None: it is drawn in Python only."""
        return find_strategy(self.strategy).number

    def to_ints(self) -> list[int]:
        """The row of the operators' `specs` (struct MaskRow of csrc/mask_rules.h)."""
        assert self.number is not None
        return [
            self.number,
            self.num_blocks,
            *self.temporal,
            *self.spatial,
            *self.aspect,
            self.predicted,
            self.temporal_below,
            self.max_context_frames,
            self.max_keep or 0,
            COMPLEMENTS[self.complement],
            int(self.inv_block),
        ]

    def target_count(self, n: int) -> int:
        """count(n): how many of n places or frames are predicted."""
        return min(n - 1, max(1, (n * self.predicted + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS))


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


@dataclass(frozen=True)
class Draw:
    """What the masks of some samples are drawn for: one mask of one group in one step."""

    grid: Grid
    sample_ids: np.ndarray
    """uint64 [B]."""
    seed: int
    step: int
    group: int
    mask: int

    def tag(self, stream: Stream, *, attempt: int = 0, block: int = 0) -> int:
        """See pack_tag."""
        return pack_tag(stream, group=self.group, mask=self.mask, attempt=attempt, block=block)


Definition = Callable[["BlockSpec", Draw], np.ndarray]
"""Gives bool [B, T, H, W], or what broadcasts to it: true where a token is predicted."""
DEFINITIONS: dict[str, Definition] = {}
"""How the strategies draw, by name."""


def defines(name: str) -> Callable[[Definition], Definition]:
    """Decorator of the definition of a strategy, a row of vjepa_fast.config.mask_strategies.STRATEGIES."""

    def add(function: Definition) -> Definition:
        DEFINITIONS[name] = function
        return function

    return add


@defines("multiblock")
def _multiblock(spec: BlockSpec, draw: Draw) -> np.ndarray:
    num_frames, height, width = draw.grid
    t, h, w = block_size(spec, draw.grid, seed=draw.seed, step=draw.step, group=draw.group, mask=draw.mask)
    target = np.zeros((len(draw.sample_ids), num_frames, height, width), dtype=bool)
    pending = np.arange(len(draw.sample_ids))
    frames, rows, columns = np.arange(num_frames), np.arange(height), np.arange(width)
    for attempt in range(MAX_ATTEMPTS):
        if not len(pending):
            break
        tags = [draw.tag(Stream.MASK_POSITION, attempt=attempt, block=block) for block in range(spec.num_blocks)]
        words = random_words(draw.seed, draw.sample_ids[pending, None], draw.step, np.array(tags)[None, :])
        top = below(words[..., 0], height - h + 1)[..., None]
        left = below(words[..., 1], width - w + 1)[..., None]
        start = below(words[..., 2], num_frames - t + 1)[..., None]
        in_t = (frames >= start) & (frames < start + t)
        in_h = (rows >= top) & (rows < top + h)
        in_w = (columns >= left) & (columns < left + w)
        covered = np.zeros((len(pending), num_frames, height, width), dtype=bool)
        for block in range(spec.num_blocks):
            covered |= in_t[:, block, :, None, None] & in_h[:, block, None, :, None] & in_w[:, block, None, None, :]
        target[pending] = covered
        pending = pending[covered[:, : spec.max_context_frames].all(axis=(1, 2, 3))]
    return target


def _places(spec: BlockSpec, draw: Draw, num_draws: int) -> np.ndarray:
    """bool [B, num_draws, H, W]: a random subset of the places for each draw."""
    _, height, width = draw.grid
    num_places = height * width
    tags = np.array(
        [
            [draw.tag(Stream.MASK_PATCHES, attempt=number, block=block) for block in range(-(-num_places // 4))]
            for number in range(num_draws)
        ]
    )
    words = random_words(draw.seed, draw.sample_ids[:, None, None], draw.step, tags)
    keys = words.reshape(len(draw.sample_ids), num_draws, -1)[..., :num_places].astype(np.uint64)
    keys = keys * np.uint64(MAX_PLACES) + np.arange(num_places, dtype=np.uint64)
    count = spec.target_count(num_places)
    drawn = keys < np.sort(keys, axis=-1)[..., count : count + 1]
    return drawn.reshape(len(draw.sample_ids), num_draws, height, width)


def _run_of_frames(spec: BlockSpec, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """bool [B, T, 1, 1]: consecutive frames; and the words r."""
    num_frames = draw.grid[0]
    count, frames = spec.target_count(num_frames), np.arange(num_frames)
    words = random_words(draw.seed, draw.sample_ids, draw.step, draw.tag(Stream.MASK_FRAMES))
    start = below(words[:, :1], num_frames - count + 1)
    return ((frames >= start) & (frames < start + count))[:, :, None, None], words


@defines("tube")
def _tube(spec: BlockSpec, draw: Draw) -> np.ndarray:
    return _places(spec, draw, 1)


@defines("patches")
def _patches(spec: BlockSpec, draw: Draw) -> np.ndarray:
    return _places(spec, draw, draw.grid[0])


@defines("temporal")
def _temporal(spec: BlockSpec, draw: Draw) -> np.ndarray:
    return _run_of_frames(spec, draw)[0]


@defines("mixture")
def _mixture(spec: BlockSpec, draw: Draw) -> np.ndarray:
    run, words = _run_of_frames(spec, draw)
    is_temporal = words[:, 1].astype(np.uint64) < np.uint64(spec.temporal_below)
    return np.where(is_temporal[:, None, None, None], run, _patches(spec, draw))


@defines("future")
def _future(spec: BlockSpec, draw: Draw) -> np.ndarray:
    num_frames = draw.grid[0]
    return (np.arange(num_frames) >= num_frames - spec.target_count(num_frames))[None, :, None, None]


def mask_sample_ref(
    spec: BlockSpec, grid: Grid, sample_ids: np.ndarray, *, seed: int, step: int, group: int = 0, mask: int = 0
) -> np.ndarray:
    """Context of each sample before any truncation.

    Args:
        spec: the mask in integers.
        grid: (T, H, W) in tokens.
        sample_ids: [B] global sample numbers.
        seed, step: of the run.
        group: which frames-per-clip group, in the order of the configuration.
        mask: which mask, in the order of the configuration.

    Returns:
        [B, N] bool, true where a token is context; every row has at least one.
    """
    sample_ids = np.asarray(sample_ids, dtype=np.uint64)
    target = DEFINITIONS[spec.strategy](spec, Draw(grid, sample_ids, seed, step, group, mask))
    context = ~np.broadcast_to(target, (len(sample_ids), *grid))
    context[:, spec.max_context_frames :] = False
    context = context.reshape(len(sample_ids), -1)
    context[~context.any(axis=1), 0] = True
    return context
