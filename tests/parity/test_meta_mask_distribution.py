"""Counter-based masks beside the reference's collator: other numbers, the same distribution.

Coverage of single tokens is no test: tokens of one block come and go together. Compared are the tokens kept, batch by
batch, the sizes of blocks, and where blocks of one size lie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking.mask_rules import BlockSpec, block_size
from vjepa_fast.masking.sampler import MaskSampler

from . import reference_v2
from .mask_cases import MASK_CASES, VARIED

pytestmark = [reference_v2.needs_reference, pytest.mark.slow]

NUM_BATCHES = 2000
NUM_SIZES = 20_000
NUM_ORIGINS = 4000
CASE = MASK_CASES["vjepa2"]
GRID = (8, 16, 16)


def assert_same_distribution(ours: Iterable[Hashable], theirs: Iterable[Hashable]) -> None:
    """Two samples of one size, by chi-square at the level of one in a thousand; rare values count as one."""
    counts = Counter(ours), Counter(theirs)
    cells: list[tuple[int, int]] = []
    rare = [0, 0]
    for value in counts[0] | counts[1]:
        pair = counts[0][value], counts[1][value]
        if sum(pair) >= 10:
            cells.append(pair)
        else:
            rare = [rare[0] + pair[0], rare[1] + pair[1]]
    if sum(rare):
        cells.append((rare[0], rare[1]))
    assert len(cells) > 1
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    degrees = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile; 3.09 is the normal one.
    critical = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    print(f"chi-square {statistic:.1f}, {degrees} degrees of freedom, critical value {critical:.1f}")
    assert statistic < critical


def test_kept_tokens() -> None:
    """Means over the batches of what each mask keeps, within three standard errors of their difference."""
    collator = reference_v2.collator(CASE)
    torch.manual_seed(CASE.seed)
    batch_size = CASE.largest_batch
    theirs, ours = np.zeros((2, NUM_BATCHES, 2, 2))
    sampler = MaskSampler(MaskConfig.model_validate(CASE.masks), GRID, seed=CASE.seed)
    for step in range(NUM_BATCHES):
        pairs = zip(*reference_v2.collate(collator, {16: batch_size})[16], strict=True)
        theirs[step] = [[context.shape[1], target.shape[1]] for context, target in pairs]
        masks = sampler(step, np.arange(batch_size) + batch_size * step)
        ours[step] = np.array([masks.context_lengths, masks.target_lengths])[:, ::batch_size].T
    means = ours.mean(0), theirs.mean(0)
    errors = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / NUM_BATCHES)
    print(
        f"kept, [mask][context, target]: ours {means[0].round(1).tolist()}, reference {means[1].round(1).tolist()}, "
        f"difference in standard errors {((means[0] - means[1]) / errors).round(2).tolist()}"
    )
    assert (np.abs(means[0] - means[1]) < 3 * errors).all()
    assert np.allclose(means[1], [[506, 966], [130, 1439]], rtol=0.05)


@pytest.mark.parametrize("masks", [*CASE.masks, VARIED], ids=["short", "long", "varied"])
def test_block_sizes(masks: dict[str, object]) -> None:
    theirs = reference_v2.collator(replace(CASE, masks=[masks])).mask_generators[16][0]
    spec = MaskSpec.model_validate(masks)
    sizes = []
    for seed in range(NUM_SIZES):
        generator = torch.Generator().manual_seed(seed)
        sizes.append(theirs._sample_block_size(generator, spec.temporal_scale, spec.spatial_scale, spec.aspect_ratio))
    own = BlockSpec.from_config(spec, GRID)
    assert_same_distribution((block_size(own, GRID, seed=CASE.seed, step=step) for step in range(NUM_SIZES)), sizes)


def test_block_origins_given_the_size() -> None:
    """A lone block of 4 x 6 x 6 tokens: its first token, from the masks themselves."""
    masks = {"spatial_scale": (0.15, 0.15), "temporal_scale": (0.5, 0.5), "aspect_ratio": (1.0, 1.0), "num_blocks": 1}
    theirs = reference_v2.collator(replace(CASE, masks=[masks])).mask_generators[16][0]
    torch.manual_seed(CASE.seed)
    reference = [
        np.unravel_index(int(theirs._sample_block_mask((4, 6, 6)).flatten().argmin()), GRID) for _ in range(NUM_ORIGINS)
    ]
    sampler = MaskSampler(MaskConfig(masks=[MaskSpec.model_validate(masks)], truncate="none"), GRID, seed=CASE.seed)
    targets = sampler(0, range(NUM_ORIGINS))
    firsts = targets.target_ids[targets.cu_seqlens_target[:-1].long()].tolist()
    ours = [np.unravel_index(first, GRID) for first in firsts]
    for axis in range(3):
        assert_same_distribution((origin[axis] for origin in ours), (origin[axis] for origin in reference))
    assert_same_distribution((origin[1:] for origin in ours), (origin[1:] for origin in reference))
