"""Mask strategies from outside the package, drawn in Python on the host.

    import numpy as np
    from vjepa_fast.masking.strategies import register

    def checkerboard(spec, grid, rng):
        \"\"\"Every other token, from a random one of the first two on.\"\"\"
        return np.flatnonzero((np.indices(grid).sum(0) + rng.integers(2)) % 2)

    register("checkerboard", checkerboard, keys=())

A config then takes `strategy: checkerboard`. What follows the draw is the same for all strategies: truncation,
`max_keep`, `max_temporal_keep`, the complements and `inv_block` (vjepa_fast.masking.mask_rules). All masks of a config
with such a strategy are drawn with NumPy and copied to the device.

A strategy must be registered before a config that names it is read, in every process that reads one. A program of one's
own imports the module that registers it. The command line and the processes that it starts find it by an entry point of
an installed package, whose name is that of the strategy and whose value is the module:

    [project.entry-points."vjepa_fast.mask_strategies"]
    checkerboard = "my_masks"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import numpy as np

from vjepa_fast.common.errors import UserError
from vjepa_fast.config.mask_strategies import STRATEGIES, STRATEGY_KEYS, MaskStrategy
from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.masking.mask_rules import BlockSpec, Draw, Grid, defines

Predict = Callable[[MaskSpec, Grid, np.random.Generator], np.ndarray]
"""Gives the ids of the predicted tokens of one mask of one clip: integers in [0, T * H * W), at least one. Their order
does not matter. The token of frame t, row h and column w is (t * H + h) * W + w.

It gets the mask as it is configured, the grid (T, H, W) in tokens and the only random numbers that it may use: they
depend on seed, step, global sample number, group and mask, so that the masks do not depend on how a step is spread over
processes. NumPy may change what its Generator makes of them from one release to another."""


def register(name: str, predict: Predict, *, keys: Iterable[str] = ("ratio",), doc: str = "") -> None:
    """Add a strategy, or replace one that was added before.

    Args:
        name: `strategy` of a mask in a config.
        predict: chooses the predicted tokens.
        keys: which of STRATEGY_KEYS it uses; a config that sets another of them is refused.
        doc: what it predicts, in a line; the first of the function's docstring if empty.

    Raises:
        ValueError: the name is one of the package's own strategies or no identifier, or there is no such key.
    """
    if name in STRATEGIES and STRATEGIES[name].number is not None:
        raise ValueError(f"mask strategy {name!r} is one of the package's own; choose another name")
    if not name.isidentifier():
        raise ValueError(f"mask strategy {name!r} has a name that is no identifier; use letters, digits and _")
    keys = frozenset(keys)
    if keys - STRATEGY_KEYS:
        raise ValueError(
            f"mask strategy {name!r} uses {', '.join(sorted(keys - STRATEGY_KEYS))}; expected some of "
            f"{', '.join(sorted(STRATEGY_KEYS))}"
        )
    text = doc or (inspect.getdoc(predict) or name).splitlines()[0]

    def definition(spec: BlockSpec, draw: Draw) -> np.ndarray:
        return np.stack([_predicted(name, predict, spec, draw, sample) for sample in draw.sample_ids.tolist()])

    defines(name)(definition)
    STRATEGIES[name] = MaskStrategy(name, None, keys, text)


def _predicted(name: str, predict: Predict, spec: BlockSpec, draw: Draw, sample: int) -> np.ndarray:
    """bool [T, H, W], true where a token is predicted."""
    # Counter-based as all other masks, but of words of 64 bits. The first word of the counter runs.
    counter = np.array([0, sample, draw.step, draw.group << 6 | draw.mask], dtype=np.uint64)
    key = np.array([draw.seed % 2**64, 0], dtype=np.uint64)
    ids = np.asarray(predict(spec.config, draw.grid, np.random.Generator(np.random.Philox(counter=counter, key=key))))
    num_tokens = draw.grid[0] * draw.grid[1] * draw.grid[2]
    if ids.dtype.kind not in "iu" or ids.size == 0 or int(ids.min()) < 0 or int(ids.max()) >= num_tokens:
        seen = f"{ids.size} values of dtype {ids.dtype}"
        if ids.size and ids.dtype.kind in "iu":
            seen = f"ids from {ids.min()} to {ids.max()}"
        raise UserError(
            f"mask strategy {name} gives {seen} for a grid of {' x '.join(map(str, draw.grid))}; expected the ids of "
            f"the predicted tokens: integers from 0 to {num_tokens - 1}, at least one"
        )
    target = np.zeros(num_tokens, dtype=bool)
    target[ids.reshape(-1)] = True
    return target.reshape(draw.grid)
