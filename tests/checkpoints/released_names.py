"""Names and shapes of the parameters of all released models, from the reference's own modules.

    python -m tests.checkpoints.released_names ../jepa ../vjepa2 ../vjepa21

writes released_names.json. All blocks of a network are alike, so that it holds one of each and their number.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("released_names.json")
_BLOCK = re.compile(r"((?:predictor_)?blocks)\.(\d+)\.(.+)")


def fold(state: dict[str, Tensor]) -> dict[str, Any]:
    """One entry for the blocks of a state dict."""
    shapes: dict[str, list[int]] = {}
    depth = 0
    for key, value in state.items():
        match = _BLOCK.fullmatch(key)
        if match is None:
            shapes[key] = list(value.shape)
            continue
        depth = max(depth, int(match[2]) + 1)
        name = f"{match[1]}.*.{match[3]}"
        assert shapes.setdefault(name, list(value.shape)) == list(value.shape), key
    return {"depth": depth, "shapes": shapes}


def unfold(folded: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict on the meta device."""
    state = {}
    for key, shape in folded["shapes"].items():
        for number in range(folded["depth"] if "*" in key else 1):
            state[key.replace("*", str(number))] = torch.empty(shape, device="meta")
    return state


def load() -> dict[str, dict[str, dict[str, Tensor]]]:
    """`encoder` and `predictor` of each model by its name, see benchmarks.round_trips.ARCHITECTURES."""
    return {
        name: {part: unfold(folded) for part, folded in parts.items()}
        for name, parts in json.loads(FILE.read_text()).items()
    }


def main() -> None:
    from benchmarks.round_trips import ARCHITECTURES, reference_states

    roots = dict(zip(("v1", "v2", "v2.1"), map(Path, sys.argv[1:]), strict=True))
    found = {
        one.name: {part: fold(state) for part, state in reference_states(one, roots[one.version]).items()}
        for one in ARCHITECTURES
    }
    text = json.dumps(found, indent=1)
    # One line a shape.
    FILE.write_text(re.sub(r"\[\s+([^\]]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n")


if __name__ == "__main__":
    main()
