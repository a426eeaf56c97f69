"""The table of mask strategies agrees with C++, and a strategy in Python can be added from outside the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config import load_recipe
from vjepa_fast.config.mask_strategies import STRATEGIES, find_strategy
from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking import strategies
from vjepa_fast.masking.mask_rules import COMPLEMENTS, DEFINITIONS, BlockSpec
from vjepa_fast.masking.mask_sample import mask_sample_captured
from vjepa_fast.masking.picture import describe
from vjepa_fast.masking.sampler import MaskSampler, StepMasks
from vjepa_fast.masking.strategies import register

ROOT = Path(__file__).resolve().parents[2]
GRID = (2, 4, 4)


def example(text: str) -> str:
    """The module that a text shows."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip() == "import numpy as np")
    last = next(number for number, line in enumerate(lines) if line.strip().startswith("register("))
    return textwrap.dedent("\n".join(lines[first : last + 1])) + "\n"


def test_documentation_shows_one_example() -> None:
    assert example(strategies.__doc__ or "") == example((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def enum(name: str) -> dict[str, int]:
    """The numbers of an enum of csrc/mask_rules.h: kPatchesOfFrames as patches_of_frames."""
    text = (ROOT / "csrc" / "mask_rules.h").read_text()
    found = re.search(rf"enum {name} : uint8_t {{(.*?)}};", text, re.DOTALL)
    assert found is not None
    entries = [entry.split("=") for entry in found[1].split(",")]
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", key.strip()[1:]).lower(): int(value) for key, value in entries}


def test_numbers_are_those_of_cpp() -> None:
    numbers = {name: row.number for name, row in STRATEGIES.items() if row.number is not None}
    assert numbers == enum("Strategy")
    assert list(COMPLEMENTS.values()) == list(enum("Complement").values())
    assert set(DEFINITIONS) == set(STRATEGIES)
    # What runs have been drawn with: a number may be added, none may change.
    assert numbers["multiblock"] == 0 and numbers["tube"] == 1 and numbers["future"] == 5
    assert BlockSpec.from_config(MaskSpec(strategy="patches"), GRID).to_ints()[0] == 3


@pytest.fixture
def add() -> Iterator[Callable[..., None]]:
    """`register`, until the test ends."""
    before = dict(STRATEGIES), dict(DEFINITIONS)
    yield register
    for table, rows in zip((STRATEGIES, DEFINITIONS), before, strict=True):
        table.clear()
        table.update(rows)  # type: ignore[arg-type]


def random_tokens(spec: MaskSpec, grid: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A share of the tokens.

    At random places.
    """
    num_tokens = int(np.prod(grid))
    return rng.permutation(num_tokens)[: round(spec.ratio * num_tokens)]


def tokens(sampler: MaskSampler, step: int, samples: Any) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """Context and target of each (mask, sample)."""
    batch = sampler(step, samples)
    parts = zip(
        batch.context_ids.split(list(batch.context_lengths)),
        batch.target_ids.split(list(batch.target_lengths)),
        strict=True,
    )
    keys = [(mask, int(sample)) for mask in range(batch.num_masks) for sample in samples]
    return {key: (c.tolist(), t.tolist()) for key, (c, t) in zip(keys, parts, strict=True)}


def test_masks_of_an_added_strategy(add: Callable[..., None]) -> None:
    add("random_tokens", random_tokens)
    assert STRATEGIES["random_tokens"].doc == "A share of the tokens." and find_strategy("random_tokens").number is None
    spec = MaskSpec(strategy="random_tokens", ratio=0.25)
    sampler = MaskSampler(MaskConfig(masks=[spec, spec], truncate="none"), GRID, seed=2**63 + 5, group=1)
    found = tokens(sampler, 7, range(40, 44))
    # By hand: the counter is (0, sample, step, group and mask), the key is the seed.
    counter, key = np.array([0, 42, 7, 1 << 6 | 1], np.uint64), np.array([2**63 + 5, 0], np.uint64)
    rng = np.random.Generator(np.random.Philox(counter=counter, key=key))
    expected = sorted(rng.permutation(32)[:8].tolist())
    assert found[1, 42] == (sorted(set(range(32)) - set(expected)), expected)
    # Every mask is another one, and depends on nothing but its numbers.
    assert len({str(pair) for pair in found.values()}) == len(found)
    assert tokens(sampler, 7, [43, 41]) == {key: found[key] for key in [(0, 43), (0, 41), (1, 43), (1, 41)]}
    for other in (MaskSampler(sampler.cfg, GRID, seed=6, group=1), MaskSampler(sampler.cfg, GRID, seed=sampler.seed)):
        assert tokens(other, 7, [42])[0, 42] != found[0, 42]
    assert tokens(sampler, 8, [42])[0, 42] != found[0, 42]


def test_rules_after_the_draw_are_the_same(add: Callable[..., None]) -> None:
    """Truncation to the shortest of the group, max_keep, complement and swap; a mask of C++ beside it stays."""
    add("some", lambda spec, grid, rng: np.arange(rng.integers(1, 32)))
    specs = [
        MaskSpec(strategy="some"),
        MaskSpec(strategy="some", max_keep=3, full_complement=True),
        MaskSpec(strategy="some", max_temporal_keep=0.5, inv_block=True),
        MaskSpec(strategy="tube", ratio=0.5),
    ]
    free = tokens(MaskSampler(MaskConfig(masks=[*specs[:1]] * 3, truncate="none"), GRID, seed=1), 0, range(4))
    found = tokens(MaskSampler(MaskConfig(masks=specs, group_size=4), GRID, seed=1), 0, range(4))
    shortest = [min(len(free[0, sample][kind]) for sample in range(4)) for kind in range(2)]
    for sample in range(4):
        context, target = free[0, sample]
        assert found[0, sample] == (context[: shortest[0]], target[: shortest[1]])
        context, target = found[1, sample]
        assert len(context) <= 3 and sorted(context + target) == list(range(32))
        assert set(found[2, sample][1]) <= set(range(16))
    tube = MaskSampler(MaskConfig(masks=[specs[3]] * 4, group_size=4), GRID, seed=1)
    assert all(found[3, sample] == tokens(tube, 0, range(4))[3, sample] for sample in range(4))


def test_step_masks_of_an_added_strategy(add: Callable[..., None]) -> None:
    """As the trainer draws them: spread over two processes they are those of one."""
    add("random_tokens", random_tokens)
    cfg = MaskConfig(masks=[MaskSpec(strategy="random_tokens", ratio=0.5)], group_size=2)

    def draw(ids: list[int], world_size: int) -> list[list[int]]:
        masks = StepMasks(
            cfg,
            fpcs=[4],
            crop_size=(32, 32),
            patch_size=8,
            tubelet_size=2,
            seed=0,
            global_batch=4,
            group_of=np.zeros_like,
            world_size=world_size,
        )
        (batch,) = masks(3, [torch.tensor(ids)], [0])
        assert batch.loss_weights == (1 / (4 * 16),) * len(ids)
        return [part.tolist() for part in batch.target_ids.split(list(batch.target_lengths))]

    assert draw([12, 13, 14, 15], 1) == draw([12, 13], 2) + draw([14, 15], 2)


def test_trains(add: Callable[..., None], tmp_path: Path) -> None:
    from tests.e2e.conftest import write_video
    from tests.helpers.tiny import tiny_config
    from vjepa_fast.train.trainer import Trainer

    add("random_tokens", random_tokens)
    for number in range(4):
        write_video(tmp_path / f"{number}.mp4", number)
    (tmp_path / "list.csv").write_text("".join(f"{tmp_path}/{number}.mp4 0\n" for number in range(4)))
    changes = "mask.masks=[{strategy: random_tokens, ratio: 0.25}]", "optimization.epochs=1", "optimization.ipe=2"
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny_config(tmp_path / "list.csv", tmp_path, *changes), folder=tmp_path / "run")
    trainer.fit()
    assert trainer.step == 2


def test_what_cannot_be_added(add: Callable[..., None]) -> None:
    for name, keys, said in (
        ("tube", (), "one of the package's own"),
        ("my mask", (), "no identifier"),
        ("mine", ("ratio", "num_block"), "uses num_block; expected some of aspect_ratio"),
    ):
        with pytest.raises(ValueError, match=said):
            add(name, random_tokens, keys=keys)
        assert name not in DEFINITIONS or name == "tube"


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "0 values"),
        ([0, 32], "ids from 0 to 32"),
        ([-1], "ids from -1"),
        (np.ones(32, bool), "32 values of dtype bool"),
    ],
)
def test_ids_that_make_no_mask(add: Callable[..., None], ids: Any, said: str) -> None:
    add("wrong", lambda spec, grid, rng: np.array(ids))
    sampler = MaskSampler(MaskConfig(masks=[MaskSpec(strategy="wrong")]), GRID, seed=0)
    with pytest.raises(UserError, match=f"wrong gives {said}.*2 x 4 x 4.*0 to 31"):
        sampler(0, range(2))


def test_added_strategy_in_a_config(add: Callable[..., None]) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("demo", ["mask.masks=[{strategy: tueb}]"])
    assert "mask.masks.0.strategy is 'tueb'" in str(error.value) and "did you mean tube?" in str(error.value)
    add("random_tokens", random_tokens, doc="some tokens")
    with pytest.raises(ConfigError, match="did you mean random_tokens"):
        load_recipe("demo", ["mask.masks=[{strategy: random_token}]"])
    spec = load_recipe("demo", ["mask.masks=[{strategy: random_tokens, ratio: 0.3}]"]).mask.masks[0]
    assert describe(spec) == "random_tokens 0.3"
    with pytest.raises(ConfigError, match="random_tokens.*num_blocks"):
        load_recipe("demo", ["mask.masks=[{strategy: random_tokens, num_blocks: 3}]"])
    with pytest.raises(RuntimeError, match="strategy random_tokens"):
        one = torch.zeros(1, dtype=torch.int64)
        mask_sample_captured([BlockSpec.from_config(spec, GRID)], GRID, one, one, one, seed=0, capacity=(32, 32))
    # Of another process, which has not registered it.
    del STRATEGIES["random_tokens"]
    with pytest.raises(ConfigError, match="strategy is 'random_tokens'"):
        BlockSpec.from_config(spec, GRID)


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "vjepa_fast", "masks", *args, "--out", str(folder / "masks.png")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_command_line_finds_the_entry_point(tmp_path: Path) -> None:
    """As pip leaves an installed package that has one."""
    (tmp_path / "my_masks.py").write_text(example(strategies.__doc__ or ""))
    about = tmp_path / "my_masks-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_masks\nVersion: 1.0\n")
    points = "[vjepa_fast.mask_strategies]\ncheckerboard = my_masks\nabsent = no_such_module\nidle = json\n"
    (about / "entry_points.txt").write_text(points)
    done = run(tmp_path, "mask.masks=[{strategy: checkerboard}]")
    assert done.returncode == 0, done.stderr
    assert "mask 0 (checkerboard): context 50.0 %, target 50.0 %" in done.stdout
    assert (tmp_path / "masks.png").stat().st_size > 1000
    for name, said in (
        ("checkerbord", "did you mean checkerboard?"),
        ("absent", "no_such_module, which cannot be imported"),
        ("idle", "not registered by json"),
    ):
        done = run(tmp_path, f"mask.masks=[{{strategy: {name}}}]")
        assert done.returncode == 2 and said in done.stderr, done.stderr
