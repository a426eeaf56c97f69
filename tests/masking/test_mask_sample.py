"""The counter-based masks against an independent scalar reading of their specification."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.ops.mask_sample import MAX_ATTEMPTS, BlockSpec, block_size, fixed_point, mask_sample_ref
from vjepa_fast.rng import philox4x32

GRIDS = [(8, 16, 16), (1, 5, 7), (3, 4, 4), (32, 24, 24)]
SPECS = [
    MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=8),
    MaskSpec(spatial_scale=(0.7, 0.7), aspect_ratio=(0.75, 1.5), num_blocks=2),
    MaskSpec(spatial_scale=(0.1, 0.6), temporal_scale=(0.2, 0.9), aspect_ratio=(0.3, 3.0), num_blocks=3),
    MaskSpec(spatial_scale=(0.5, 0.9), max_temporal_keep=0.4, num_blocks=2),
]


def words(seed: int, sample: int, step: int, stream: int, group: int, mask: int, attempt: int = 0, block: int = 0):
    tag = stream * 2**28 + group * 2**24 + mask * 2**18 + attempt * 2**10 + block
    counter = [sample % 2**32, sample // 2**32, step % 2**32, tag]
    return [int(w) for w in philox4x32(np.array(counter, dtype=np.uint64), (seed % 2**32, seed // 2**32))]


def fixed(x: float) -> int:
    return math.ceil(Fraction(x) * 2**24)


def draw(bounds, word):
    low, high = fixed(bounds[0]), fixed(bounds[1])
    return low + (high - low) * word // 2**32


def scalar_size(spec, grid, seed, step, group, mask):
    big_t, big_h, big_w = grid
    r = words(seed, 0, step, 1, group, mask)
    t = max(1, big_t * draw(spec.temporal_scale, r[0]) // 2**24)
    s = max(1, big_h * big_w * draw(spec.spatial_scale, r[1]) // 2**24)
    ratio = draw(spec.aspect_ratio, r[2])
    h = (math.isqrt(s * ratio // 2**22) + 1) // 2
    w = (math.isqrt(s * 2**26 // ratio) + 1) // 2
    return min(t, big_t), min(max(1, h), big_h), min(max(1, w), big_w)


def scalar_context(spec, grid, seed, step, sample, group, mask):
    big_t, big_h, big_w = grid
    t, h, w = scalar_size(spec, grid, seed, step, group, mask)
    keep = max(1, int(big_t * spec.max_temporal_keep))
    for attempt in range(32):
        free = [[[frame < keep] * big_w for _ in range(big_h)] for frame in range(big_t)]
        for block in range(spec.num_blocks):
            r = words(seed, sample, step, 2, group, mask, attempt, block)
            top, left = (big_h - h + 1) * r[0] // 2**32, (big_w - w + 1) * r[1] // 2**32
            start = (big_t - t + 1) * r[2] // 2**32
            for i in range(start, start + t):
                for j in range(top, top + h):
                    for k in range(left, left + w):
                        free[i][j][k] = False
        flat = [x for frame in free for row in frame for x in row]
        if any(flat):
            return flat
    return [True] + [False] * (big_t * big_h * big_w - 1)


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_equals_the_specification_to_the_bit(grid, spec):
    seed, samples = 2**63 + 12345, np.array([0, 1, 2**32 - 1, 2**32 + 5, 2**40])
    for step, group, mask in ((0, 0, 0), (7, 3, 1), (2**31, 15, 63)):
        blocks = BlockSpec.from_config(spec, grid)
        assert block_size(blocks, grid, seed=seed, step=step, group=group, mask=mask) == scalar_size(
            spec, grid, seed, step, group, mask)
        ours = mask_sample_ref(blocks, grid, samples, seed=seed, step=step, group=group, mask=mask)
        expected = [scalar_context(spec, grid, seed, step, int(s), group, mask) for s in samples]
        assert (ours == np.array(expected)).all()


def test_published_hash():
    """What other implementations must reproduce; changing it changes everybody's runs."""
    digest = hashlib.sha256()
    for spec in SPECS:
        for grid in GRIDS:
            for step in (0, 1, 999):
                context = mask_sample_ref(
                    BlockSpec.from_config(spec, grid), grid, np.arange(24) + 24 * step, seed=239, step=step)
                digest.update(np.packbits(context).tobytes())
    assert digest.hexdigest() == PUBLISHED


PUBLISHED = "dd431cf37acfabed36b86063f605541a242e8b52aa2ffd0793eb242ba959124f"


def test_fixed_point_rounds_up_so_that_whole_products_stay_whole():
    for tenths in range(1, 11):
        for size in range(10, 200, 10):
            assert size * fixed_point(tenths / 10) >> 24 == size * tenths // 10


def test_size_of_a_fixed_scale_is_the_rounded_square_root():
    spec = BlockSpec.from_config(MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(1.0, 1.0)), (8, 16, 16))
    assert block_size(spec, (8, 16, 16), seed=1, step=0) == (8, 6, 6)


def test_redraws_when_no_context_is_left_and_ends_when_there_can_be_none():
    # Two half-frame blocks on a 2 x 2 grid often cover it; the redrawn ones must leave something.
    spec = BlockSpec.from_config(MaskSpec(spatial_scale=(0.5, 0.5), aspect_ratio=(2.0, 2.0), num_blocks=2), (1, 2, 2))
    context = mask_sample_ref(spec, (1, 2, 2), np.arange(200), seed=0, step=0)
    assert context.any(axis=1).all()
    full = BlockSpec.from_config(MaskSpec(spatial_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0)), (2, 4, 4))
    context = mask_sample_ref(full, (2, 4, 4), np.arange(5), seed=0, step=0)
    assert context[:, 0].all() and context.sum() == 5
    assert MAX_ATTEMPTS == 32


def test_mean_context_is_the_references():
    """Mean kept share of the V-JEPA 2 masks without truncation, close to what the reference's collator keeps."""
    grid = (8, 16, 16)
    for spec, low, high in ((SPECS[0], 0.35, 0.41), (SPECS[1], 0.17, 0.23)):
        share = np.mean([
            mask_sample_ref(BlockSpec.from_config(spec, grid), grid, np.arange(8), seed=5, step=step).mean()
            for step in range(150)])
        assert low < share < high
