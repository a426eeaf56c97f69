"""The counter-based generator: published vectors, layout, uniformity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.philox import VECTORS
from vjepa_fast.common import rng

U32 = st.integers(0, 2**32 - 1)


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """The published definition with Python's integers, round by round."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    result = rng.philox4x32(np.array(counter), key)
    assert result.dtype == np.uint32
    assert tuple(int(word) for word in result) == expected


@given(st.lists(st.tuples(U32, U32, U32, U32), min_size=1, max_size=5), st.tuples(U32, U32))
def test_batches_equal_the_scalar_definition(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    expected = [philox_scalar(list(counter), list(key)) for counter in counters]
    assert rng.philox4x32(np.array(counters, dtype=np.uint64), key).tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), U32, U32)
def test_counter_and_key_layout(seed: int, sample: int, step: int, tag: int) -> None:
    expected = philox_scalar([sample % 2**32, sample >> 32, step, tag], [seed % 2**32, seed >> 32])
    assert rng.random_words(seed, sample, step, tag).tolist() == expected


def test_broadcast_equals_one_by_one() -> None:
    samples = np.array([0, 7, 2**33 + 1])
    tags = np.array([rng.pack_tag(rng.Stream.CROP), rng.pack_tag(rng.Stream.FLIP, block=3)])
    together = rng.random_words(5, samples[:, None], 11, tags)
    assert together.shape == (3, 2, 4)
    for row, sample in enumerate(samples):
        for column, tag in enumerate(tags):
            assert (together[row, column] == rng.random_words(5, int(sample), 11, int(tag))).all()


def test_tag_fields_do_not_overlap() -> None:
    tag = rng.pack_tag(15, group=15, mask=63, attempt=255, block=1023)
    assert tag == 2**32 - 1
    fields = [{"group": 1}, {"mask": 1}, {"attempt": 1}, {"block": 1}]
    singles = [rng.pack_tag(0, **field) for field in fields]
    assert singles == [1 << 24, 1 << 18, 1 << 10, 1]
    assert rng.pack_tag(1) == 1 << 28


@pytest.mark.parametrize("field", [{"group": 16}, {"mask": 64}, {"attempt": 256}, {"block": 1024}, {"block": -1}])
def test_tag_field_too_large(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        rng.pack_tag(rng.Stream.MASK_SIZE, **field)


@given(U32, st.integers(1, 2**31))
def test_below_is_the_integer_formula(word: int, n: int) -> None:
    drawn = int(rng.below(word, n))
    assert drawn == word * n >> 32
    assert 0 <= drawn < n


def test_below_and_unit_are_uniform() -> None:
    words = rng.random_words(1, np.arange(20000), 0, rng.pack_tag(rng.Stream.VIDEO)).ravel()
    counts = np.bincount(rng.below(words, 10), minlength=10)
    # Chi-square with 9 degrees of freedom: 27.9 is exceeded once in a thousand seeds, and the seed is fixed.
    assert ((counts - 8000) ** 2 / 8000).sum() < 27.9
    units = rng.unit(words)
    assert units.min() >= 0 and units.max() < 1
    assert rng.unit(2**32 - 1) < 1
    assert abs(units.mean() - 0.5) < 0.005
    # Neighbouring samples are unrelated.
    assert abs(np.corrcoef(units[:-4:4], units[4::4])[0, 1]) < 0.03
