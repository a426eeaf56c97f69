"""Counter-based random numbers: Philox-4x32-10.

Every random decision of a run (which video, which frames, crop, flip, mask) is a pure function of integers: a 64-bit
seed as the key and a 128-bit counter that names the decision. Nothing has to be checkpointed, and the order in which
numbers are asked for, the number of processes and the number of workers change nothing.

Generator: Philox-4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
same function as in Random123, cuRAND and JAX. Known-answer vectors of Random123 are in tests/common/test_rng.py.

Key:      key[0] = seed bits 0..31, key[1] = seed bits 32..63.
Counter:  counter[0], counter[1] = global sample number, low and high 32 bits
          counter[2]             = step (masks) or epoch (data), low 32 bits
          counter[3]             = tag: stream << 28 | group << 24 | mask << 18 | attempt << 10 | block
          (stream 4 bits, group 4 bits, mask 6 bits, attempt 8 bits, block 10 bits; the streams are listed in Stream;
          MASK_PATCHES puts a frame number in attempt and a quarter of a place number in block)

An integer in [0, n) is drawn from a 32-bit word r as (r * n) >> 32: integers only, bias below n / 2**32.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
NUM_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Stream(IntEnum):
    """What a number is drawn for: streams never overlap."""

    MASK_SIZE = 1
    MASK_POSITION = 2
    DATASET = 3
    VIDEO = 4
    FRAMES = 5
    CROP = 6
    FLIP = 7
    REPLACEMENT = 8
    SYNTHETIC = 9
    DROP_PATH = 10
    MASK_PATCHES = 11
    MASK_FRAMES = 12
    PHYSICS = 13


def pack_tag(stream: int, *, group: int = 0, mask: int = 0, attempt: int = 0, block: int = 0) -> int:
    """The fourth counter word; every field must fit its width (see the module docstring)."""
    for name, value, bits in (
        ("stream", stream, 4),
        ("group", group, 4),
        ("mask", mask, 6),
        ("attempt", attempt, 8),
        ("block", block, 10),
    ):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}={value} does not fit the {bits} bits it has in the random counter")
    return int(stream) << 28 | group << 24 | mask << 18 | attempt << 10 | block


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox-4x32.

    Args:
        counter: [..., 4] integers, each word taken modulo 2**32.
        key: two 32-bit words.

    Returns:
        [..., 4] uint32.
    """
    c0, c1, c2, c3 = (np.asarray(counter).astype(np.uint64, copy=False)[..., i] & _LOW for i in range(4))
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(NUM_ROUNDS):
        product_0 = c0 * np.uint64(MULTIPLIER_0)
        product_1 = c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0, k1 = (k0 + WEYL_0) & 0xFFFFFFFF, (k1 + WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def split_seed(seed: int) -> tuple[int, int]:
    """The two key words of a seed, taken modulo 2**64."""
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    return seed & 0xFFFFFFFF, seed >> 32


def random_words(seed: int, sample: int | np.ndarray, step: int | np.ndarray, tag: int | np.ndarray) -> np.ndarray:
    """Four random 32-bit words for each (sample, step, tag), which broadcast against each other.

    Returns:
        [..., 4] uint32.
    """
    sample = np.asarray(sample, dtype=np.uint64)
    step = np.asarray(step, dtype=np.uint64) & _LOW
    tag = np.asarray(tag, dtype=np.uint64)
    sample, step, tag = np.broadcast_arrays(sample, step, tag)
    counter = np.stack([sample & _LOW, sample >> _SHIFT, step, tag], axis=-1)
    return philox4x32(counter, split_seed(seed))


def below(word: int | np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Uniform integers in [0, n) from 32-bit words: (word * n) >> 32, int64."""
    return ((np.asarray(word, dtype=np.uint64) * np.asarray(n, dtype=np.uint64)) >> _SHIFT).astype(np.int64)


def unit(word: int | np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1), exact: word / 2**32."""
    return np.asarray(word, dtype=np.float64) / 4294967296.0
