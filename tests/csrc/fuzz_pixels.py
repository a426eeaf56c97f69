"""Throw random and hostile arguments at the pixel operator under the address and undefined-behaviour sanitizers.

    python tests/csrc/fuzz_pixels.py --seconds 600

Builds the CPU operator and the emulated threads of the CUDA kernel with GCC's sanitizers and runs itself again with the
library loaded. Arguments in order must give what the definition gives; others may give a clip or raise RuntimeError.
Anything else, or a report of a sanitizer, ends the run with an error.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
from building import CHILD, run_sanitized
from torch import Tensor

# Sides to 2**15 are in order and would only fill the memory.
EXTREMES = [
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    10,
    14,
    15,
    60,
    2**15 + 1,
    2**31 - 1,
    2**31,
    2**62,
    2**63 - 1,
]


def random_case(pick: random.Random) -> Any:
    from tests.ops.pixel_cases import LAYOUTS, Case
    from vjepa_fast.ops.clip_pixels import MATRICES

    largest = pick.choice([3, 20, 90])
    height, width = pick.randint(1, largest), pick.randint(1, largest)
    box_height, box_width = pick.randint(1, height), pick.randint(1, width)
    return Case(
        (pick.randint(0, 6), height, width),
        (pick.randint(0, height - box_height), pick.randint(0, width - box_width), box_height, box_width),
        (pick.randint(1, largest), pick.randint(1, largest)),
        pick.random() < 0.5,
        pick.choice([8, 8, 9, 10, 14]),
        (pick.randint(1, 4), pick.randint(1, 4), pick.randint(0, 8), pick.randint(0, 8)),
        pick.choice(MATRICES),
        pick.random() < 0.5,
        pick.choice(LAYOUTS),
        pick.getrandbits(16),
        pick.random() < 0.5,
    )


def broken(pick: random.Random, arguments: list[Any]) -> list[Any]:
    """Some arguments replaced by others that may be out of order."""
    out = list(arguments)
    for _ in range(pick.choice([1, 1, 2, 4])):
        place = pick.randrange(len(out))
        value = out[place]
        if isinstance(value, Tensor):
            shape = [pick.choice([0, 1, 2, 5]) for _ in range(pick.randint(0, 4))]
            made = [torch.zeros(shape, dtype=value.dtype)]
            if value.ndim == 3 and value.dtype != torch.float32:
                made += [value.float(), value.to(torch.uint16), value[..., :1], value[:1], value[..., :0]]
            out[place] = pick.choice(made)
        elif isinstance(value, bool):
            out[place] = not value
        elif isinstance(value, int):
            out[place] = pick.choice(EXTREMES)
        else:
            out[place] = list(value)
            if out[place] and pick.random() < 0.8:
                out[place][pick.randrange(len(out[place]))] = pick.choice(EXTREMES)
            else:
                out[place] = out[place][:-1] if pick.random() < 0.5 else out[place] * 2
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = os.environ.get(CHILD)
    if folder is None:
        return run_sanitized(__file__, sys.argv[1:], "clip_pixels.cpp", "emulated_pixels.cpp")
    from tests.ops.pixel_cases import emulate

    torch.ops.load_library(f"{folder}/operators.so")
    threads = ctypes.CDLL(f"{folder}/emulated.so")
    pick, outcomes, end = random.Random(options.seed), Counter[str](), time.monotonic() + options.seconds
    while time.monotonic() < end:
        case = random_case(pick)
        arguments, expected = case.arguments(), case.reference()
        assert torch.ops.vjepa_fast.clip_pixels(*arguments).equal(expected), case
        assert emulate(threads, arguments, pick.choice([1, 32, 128])).equal(expected), case
        outcomes["equal to the definition"] += 1
        try:
            torch.ops.vjepa_fast.clip_pixels(*broken(pick, arguments))
            outcomes["replaced arguments: a clip"] += 1
        except RuntimeError:
            outcomes["replaced arguments: refused"] += 1
    print(f"{options.seconds:g} s without a finding")
    for name, count in sorted(outcomes.items()):
        print(f"  {name}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
