"""Chooses fixed sizes that serve batches of varying size with little padding."""

from __future__ import annotations

from collections.abc import Sequence

from vjepa_fast.masking.dynamic import Sizes


def choose_buckets(seen: Sequence[Sizes], count: int, context_cost: float, unit: int = 1) -> list[Sizes]:
    """The sizes, at most `count` of them, that waste least on the batches seen.

    A batch is served by the bucket of those with about as many context tokens: with the batches in the order of these,
    each bucket takes some neighbours. Every choice of the borders is looked at, by dynamic programming.

    Args:
        seen: what batches need.
        count: at most so many buckets.
        context_cost: what a context token of room costs, in target tokens.
        unit: sizes are rounded up to multiples of this.

    Returns:
        Smallest context first. All have room for the longest sequences of all, which costs next to nothing.
    """
    ordered = sorted(seen)
    longest = Sizes.around(ordered)[2:]
    waste = [[0.0] * (len(ordered) + 1) for _ in ordered]
    for first in range(len(ordered)):
        contexts = targets = most = 0
        for last in range(first, len(ordered)):
            contexts += ordered[last].context
            targets += ordered[last].target
            most = max(most, ordered[last].target)
            number = last - first + 1
            waste[first][last + 1] = (
                context_cost * (number * ordered[last].context - contexts) + number * most - targets
            )
    # best[end]: waste of the first `end` batches and the borders of their buckets.
    best: list[tuple[float, tuple[int, ...]]] = [(waste[0][end], (0, end)) for end in range(len(ordered) + 1)]
    for _ in range(1, count):
        best = [
            min([best[end], *((best[first][0] + waste[first][end], (*best[first][1], end)) for first in range(1, end))])
            for end in range(len(ordered) + 1)
        ]
    borders = best[-1][1]
    rooms = []
    for first, end in zip(borders, borders[1:], strict=False):
        around = Sizes.around(ordered[first:end])
        rooms.append(Sizes(around.context, around.target, *longest).rounded(unit))
    return list(dict.fromkeys(rooms))
