"""The counter-based masks against an independent scalar reading of their specification."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.common.rng import philox4x32
from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking.mask_rules import MAX_ATTEMPTS, BlockSpec, block_size, fixed_point, mask_sample_ref

GRIDS = [(8, 16, 16), (1, 5, 7), (3, 4, 4), (32, 24, 24)]
SPECS = [
    MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=8),
    MaskSpec(spatial_scale=(0.7, 0.7), aspect_ratio=(0.75, 1.5), num_blocks=2),
    MaskSpec(spatial_scale=(0.1, 0.6), temporal_scale=(0.2, 0.9), aspect_ratio=(0.3, 3.0), num_blocks=3),
    MaskSpec(spatial_scale=(0.5, 0.9), max_temporal_keep=0.4, num_blocks=2),
]
BY_RATIO = [
    MaskSpec(strategy="tube", ratio=0.6),
    MaskSpec(strategy="temporal", ratio=0.5),
    MaskSpec(strategy="patches"),
    MaskSpec(strategy="mixture", temporal_probability=0.3, max_temporal_keep=0.6),
    MaskSpec(strategy="future", ratio=0.25),
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


def count(n, ratio):
    return min(n - 1, max(1, (n * fixed(ratio) + 2**23) // 2**24))


def scalar_places(spec, places, seed, step, sample, group, mask, frame):
    keyed = []
    for place in range(places):
        key = words(seed, sample, step, 11, group, mask, frame, place // 4)[place % 4]
        keyed.append((key, place))
    return {place for _, place in sorted(keyed)[: count(places, spec.ratio)]}


def scalar_by_ratio(spec, grid, seed, step, sample, group, mask):
    frames, places = grid[0], grid[1] * grid[2]
    run = count(frames, spec.ratio)
    r = words(seed, sample, step, 12, group, mask)
    strategy = spec.strategy
    if strategy == "mixture":
        strategy = "temporal" if r[1] < math.ceil(Fraction(spec.temporal_probability) * 2**32) else "patches"
    target = set()
    for frame in range(frames):
        start = {"temporal": (frames - run + 1) * r[0] // 2**32, "future": frames - run}.get(strategy, frames)
        if start <= frame < start + run:
            target |= {frame * places + place for place in range(places)}
        if strategy in ("tube", "patches"):
            chosen = scalar_places(spec, places, seed, step, sample, group, mask, frame if strategy == "patches" else 0)
            target |= {frame * places + place for place in chosen}
    limit = max(1, int(frames * spec.max_temporal_keep)) * places
    context = [i not in target and i < limit for i in range(frames * places)]
    return context if any(context) else [True] + context[1:]


@pytest.mark.parametrize("grid", [(8, 6, 5), (1, 1, 1), (3, 1, 1), (1, 4, 4), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("spec", BY_RATIO, ids=lambda spec: spec.strategy)
def test_strategies_by_ratio_equal_the_specification_to_the_bit(grid, spec):
    samples = np.array([0, 1, 2, 2**32 + 5])
    for seed, step, group, mask in ((1, 0, 0, 0), (2**63 + 7, 2**31, 15, 63)):
        ours = mask_sample_ref(
            BlockSpec.from_config(spec, grid), grid, samples, seed=seed, step=step, group=group, mask=mask
        )
        expected = [scalar_by_ratio(spec, grid, seed, step, int(s), group, mask) for s in samples]
        assert (ours == np.array(expected)).all()


def test_shares_and_shapes_of_the_strategies():
    grid, samples = (8, 4, 5), np.arange(400)
    target = {
        spec.strategy: ~mask_sample_ref(BlockSpec.from_config(spec, grid), grid, samples, seed=3, step=1).reshape(
            -1, 8, 20
        )
        for spec in (MaskSpec(strategy=name, ratio=0.25) for name in ("tube", "temporal", "patches", "mixture"))
    }
    for name, share in target.items():
        assert (share.sum((1, 2)) == 40).all(), name
    assert (target["tube"] == target["tube"][:, :1]).all()
    assert (target["patches"].sum(2) == 5).all()
    frames = target["temporal"].all(2)
    assert (frames == target["temporal"].any(2)).all() and (np.diff(frames.astype(int), axis=1) == 1).sum(1).max() == 1
    # Every start from 0 to 6 about as often: chi-square with 6 degrees of freedom, 22.5 once in a thousand seeds.
    starts = np.bincount(frames.argmax(1), minlength=7)
    assert ((starts - 400 / 7) ** 2 / (400 / 7)).sum() < 22.5
    assert 160 < target["mixture"].all(2).any(1).sum() < 240
    # Every place about as often: 19 degrees of freedom.
    places = target["patches"].sum((0, 1))
    assert ((places - 800) ** 2 / 800).sum() < 43.8
    future = ~mask_sample_ref(
        BlockSpec.from_config(MaskSpec(strategy="future"), grid), grid, samples, seed=3, step=1
    ).reshape(-1, 8, 20)
    assert not future[:, :5].any() and future[:, 5:].all()


@pytest.mark.parametrize(
    "spec, grid, message",
    [
        (MaskSpec(), (65, 64, 64), "at most 262144"),
        (MaskSpec(strategy="tube"), (2, 65, 64), "4096 places"),
        (MaskSpec(strategy="mixture"), (257, 2, 2), "257 token frames"),
    ],
)
def test_grids_that_are_too_large(spec, grid, message):
    with pytest.raises(ConfigError, match=message):
        BlockSpec.from_config(spec, grid)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"ratio": 0.3}, "multiblock does not use ratio"),
        ({"strategy": "tube", "num_blocks": 3, "spatial_scale": (0.1, 0.2)}, "not use spatial_scale and num_blocks"),
        ({"strategy": "patches", "temporal_probability": 0.1}, "not use temporal_probability"),
        ({"strategy": "tube", "ratio": 1.0}, "less than 1"),
        ({"strategy": "cubes"}, "multiblock"),
    ],
)
def test_keys_that_a_strategy_does_not_use(keys, message):
    with pytest.raises(ValueError, match=message):
        MaskSpec(**keys)


def test_a_written_config_can_be_read_again():
    for spec in (*SPECS, *BY_RATIO):
        assert MaskSpec.model_validate(spec.model_dump(mode="json")) == spec
    with pytest.raises(ValueError, match="reference draws multiblock masks only"):
        MaskConfig(masks=[MaskSpec(strategy="tube")], source="reference")


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_equals_the_specification_to_the_bit(grid, spec):
    seed, samples = 2**63 + 12345, np.array([0, 1, 2**32 - 1, 2**32 + 5, 2**40])
    for step, group, mask in ((0, 0, 0), (7, 3, 1), (2**31, 15, 63)):
        blocks = BlockSpec.from_config(spec, grid)
        assert block_size(blocks, grid, seed=seed, step=step, group=group, mask=mask) == scalar_size(
            spec, grid, seed, step, group, mask
        )
        ours = mask_sample_ref(blocks, grid, samples, seed=seed, step=step, group=group, mask=mask)
        expected = [scalar_context(spec, grid, seed, step, int(s), group, mask) for s in samples]
        assert (ours == np.array(expected)).all()


@pytest.mark.parametrize("name", ["multiblock", "by_ratio"])
def test_published_hash(name):
    """What other implementations must reproduce; changing it changes everybody's runs."""
    digest = hashlib.sha256()
    for spec in {"multiblock": SPECS, "by_ratio": BY_RATIO}[name]:
        for grid in GRIDS:
            for step in (0, 1, 999):
                context = mask_sample_ref(
                    BlockSpec.from_config(spec, grid), grid, np.arange(24) + 24 * step, seed=239, step=step
                )
                digest.update(np.packbits(context).tobytes())
    assert digest.hexdigest() == PUBLISHED[name]


PUBLISHED = {
    "multiblock": "dd431cf37acfabed36b86063f605541a242e8b52aa2ffd0793eb242ba959124f",
    "by_ratio": "c81071782a5f8007bbeab3124a09eed6439a94d9f006a10f16b9bd50717dd6c9",
}


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
        share = np.mean(
            [
                mask_sample_ref(BlockSpec.from_config(spec, grid), grid, np.arange(8), seed=5, step=step).mean()
                for step in range(150)
            ]
        )
        assert low < share < high
