"""Throw random and hostile arguments at the mask operators under the address and undefined-behaviour sanitizers.

    python tests/csrc/fuzz_masks.py --seconds 600

Builds the CPU operators and the emulated thread block of the CUDA kernels with GCC's sanitizers and runs itself again
with the library loaded. A call may return masks, which are then checked against what a mask is and now and then against
NumPy, or raise RuntimeError; anything else, a report of a sanitizer or a call that takes a minute ends the run with an
error.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from building import CHILD, run_sanitized
from torch import Tensor

SLOWEST_S = 60
EXTREMES = [
    -(2**63),
    -(2**32),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    13,
    14,
    255,
    2**18,
    2**24,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
]


class Fuzzer:
    def __init__(self, folder: Path, seed: int) -> None:
        from tests.masking import mask_cases
        from vjepa_fast.masking import mask_sample as mask_ops

        torch.ops.load_library(str(folder / "operators.so"))
        self.ops = torch.ops.vjepa_fast
        self.block = ctypes.CDLL(str(folder / "emulated.so"))
        self.mask_cases = mask_cases
        self.mask_ops = mask_ops
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def spec(self) -> Any:
        """A random MaskSpec."""
        from vjepa_fast.config.schema import MaskSpec

        pick = self.random
        strategy = pick.choice(self.mask_cases.NAMES)
        keys: dict[str, Any] = {
            "max_temporal_keep": pick.choice([1.0, 0.5, 0.01]),
            "max_keep": pick.choice([None, 1, 50]),
            "inv_block": pick.random() < 0.3,
            **pick.choice([{}, {"full_complement": True}, {"pred_full_complement": True}]),
        }
        if strategy == "multiblock":
            for name, top in (("spatial_scale", 1.0), ("temporal_scale", 1.0), ("aspect_ratio", 255.0)):
                low, high = sorted(top * pick.random() ** 3 + 1e-6 for _ in range(2))
                keys[name] = (min(low, top), pick.choice([min(high, top), top]))
            keys["num_blocks"] = pick.choice([1, 2, 8, 40, 1024])
        else:
            keys["ratio"] = pick.uniform(1e-6, 1 - 1e-6)
        return MaskSpec(strategy=strategy, **keys)

    def case(self) -> Any:
        """A batch that is in order."""
        pick = self.random
        grid = pick.choice(
            [
                (1, 1, 1),
                (8, 16, 16),
                (64, 24, 24),
                (2, 64, 64),
                (1, 1, 2**18),
                (2**18, 1, 1),
                (1, 511, 513),
                *[tuple(pick.randint(1, 20) for _ in range(3)) for _ in range(30)],
            ]
        )
        specs = [self.spec() for _ in range(pick.randint(1, 4))]
        if grid[1] * grid[2] > 4096 or grid[0] > 256:
            from vjepa_fast.config.schema import MaskSpec

            specs = [MaskSpec(num_blocks=pick.choice([1, 4]), temporal_scale=(0.1, 0.5)), MaskSpec(strategy="future")]
        first = pick.choice([0, 7, 2**40, 2**63 - 70])
        ids = [first + i for i in pick.sample(range(60), pick.randint(0, 6))]
        group_size = pick.choice([-1, 0, 1, 3, 8, 2**63 - 1])
        members = sorted({*ids, *(first + i for i in pick.sample(range(60), pick.randint(0, 4)))})
        pick.shuffle(members)
        return self.mask_cases.Case(
            tuple(specs),
            grid,
            tuple(ids),
            tuple(members),
            group_size,
            seed=pick.getrandbits(64),
            step=pick.choice([0, 5, 2**31, 2**32 - 1]),
            group=pick.randint(0, 15),
        )

    def broken_tensor(self, tensor: Tensor) -> Tensor:
        pick = self.random
        if tensor.dtype in (torch.int8, torch.float32):
            return tensor  # broken before
        shape = [pick.choice([0, 1, 2, 5]) for _ in range(pick.randint(0, 4))]
        strided = {1: lambda: tensor.repeat(2)[::2], 2: lambda: tensor.flip(0)[:, ::2]}
        return pick.choice(
            [
                lambda: tensor.float(),
                lambda: tensor.to(torch.int8),
                lambda: tensor.reshape(1, -1),
                lambda: torch.full_like(tensor, pick.choice([-(2**31), -1, 0, 1, 144, 2**31 - 1])),
                lambda: torch.zeros(shape, dtype=tensor.dtype),
                strided.get(tensor.ndim, lambda: tensor),
                lambda: torch.cat([tensor.flatten(), tensor.flatten()[:1]]),
                lambda: tensor.flatten()[:0],
                lambda: tensor.new_zeros(()).expand(tensor.shape),
            ]
        )()

    def broken(self, arguments: list[Any]) -> list[Any]:
        """Some arguments replaced by others that may be out of order."""
        pick = self.random
        out = list(arguments)
        for _ in range(pick.choice([1, 1, 2, 4])):
            place = pick.randrange(len(out))
            value = out[place]
            if isinstance(value, Tensor):
                out[place] = self.broken_tensor(value)
            elif isinstance(value, int):
                # Capacities up to 2**31 - 1 are in order and would only fill the memory.
                out[place] = pick.choice([x for x in EXTREMES if x != 2**31 - 1])
            else:
                out[place] = list(value)
                for _ in range(pick.choice([1, 1, 3])):
                    action = pick.random()
                    if out[place] and action < 0.8:
                        out[place][pick.randrange(len(out[place]))] = pick.choice(EXTREMES)
                    elif action < 0.9:
                        out[place] = out[place][: pick.randrange(len(out[place]) + 1)]
                    else:
                        out[place] = out[place] * pick.choice([2, 3, 70])
        return out

    def call(self, name: str, arguments: list[Any]) -> Any:
        """The result, or None where the operator refused."""
        faulthandler.dump_traceback_later(SLOWEST_S, exit=True)
        began = time.perf_counter()
        try:
            result = getattr(self.ops, name)(*arguments)
            self.outcomes[f"{name}: returned"] += 1
            return result
        except RuntimeError:
            self.outcomes[f"{name}: refused"] += 1
            return None
        finally:
            self.slowest = max(self.slowest, time.perf_counter() - began)
            faulthandler.cancel_dump_traceback_later()

    def check(self, lengths: Tensor, num_tokens: int, packed: tuple[Tensor, ...]) -> None:
        context_ids, target_ids, cu_seqlens, totals = packed
        assert cu_seqlens[:, 0].tolist() == [0] * 3 and totals.tolist() == lengths.sum(1).tolist()
        for kind, ids in enumerate((context_ids, target_ids)):
            assert cu_seqlens[kind].diff().equal(lengths[kind])
            total = int(totals[kind])
            assert not ids[total:].any() and (total == 0 or 0 <= int(ids.min()) <= int(ids.max()) < num_tokens)
            for own in ids[:total].split(lengths[kind].tolist()):
                assert (own.diff() > 0).all()

    def one(self) -> None:
        """A batch in order, the same with arguments replaced, and the emulated thread block."""
        pick, case = self.random, self.case()
        step, ids, members = case.tensors()
        arguments = [step, ids, members, *case.key, case.group_size]
        lengths = self.call("mask_lengths", arguments)
        assert lengths is not None
        totals = lengths.sum(1).tolist()
        spare = pick.choice([0, 0, 1, 1000])
        sampling = [step, ids, lengths, *case.key, *(total + spare for total in totals)]
        packed = self.call("mask_sample", sampling)
        num_tokens = case.grid[0] * case.grid[1] * case.grid[2]
        self.check(lengths, num_tokens, packed)
        self.call("mask_lengths", self.broken(arguments))
        self.call("mask_sample", self.broken(sampling))
        self.call("philox4x32", self.broken([torch.arange(8).view(2, 4), 1, 2]))
        if num_tokens <= 4096 and ids.numel():
            small = max((spec.num_blocks for spec in case.masks), default=0) < 100
            if pick.random() < 0.2 and small:
                case.check((lengths, *packed), spare)
                self.outcomes["compared with NumPy"] += 1
            num_threads, stride = pick.choice([32, 128, 256]), pick.choice([1, 37, 255])
            wild = lengths.numpy().copy()
            for _ in range(pick.randint(0, 3)):
                wild[pick.randrange(2), pick.randrange(wild.shape[1])] = pick.choice([-(2**31), -1, 0, 5, 2**31 - 1])
            sizes = tuple(pick.choice([0, 1, total // 2, total, total + 9]) for total in totals)
            exact = self.mask_cases.emulate(self.block, case, num_threads, stride)
            assert all(a.equal(b) for a, b in zip(exact[:1], (lengths,), strict=True))
            self.mask_cases.emulate(self.block, case, num_threads, stride, capacity=sizes, lengths=wild)
            self.outcomes["emulated thread blocks"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = os.environ.get(CHILD)
    if folder is None:
        return run_sanitized(__file__, sys.argv[1:], "mask_sampler.cpp", "emulated_block.cpp", OMP_NUM_THREADS="2")
    np.seterr(all="raise")
    fuzzer = Fuzzer(Path(folder), arguments.seed)
    end = time.monotonic() + arguments.seconds
    rounds = 0
    while time.monotonic() < end:
        fuzzer.one()
        rounds += 1
    print(f"{rounds} rounds in {arguments.seconds:g} s without a finding; slowest call {fuzzer.slowest:.2f} s")
    for name, count in sorted(fuzzer.outcomes.items()):
        print(f"  {name}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
