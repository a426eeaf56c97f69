"""The compiled mask operators against the NumPy reference, to the bit."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.building import load_emulator
from tests.helpers.philox import VECTORS
from tests.masking.mask_cases import EXAMPLES, PLAIN, Case, cases, emulate, needs_extension
from vjepa_fast.common import extension
from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking import mask_sample as mask_ops
from vjepa_fast.masking.sampler import MaskSampler

ROOT = Path(__file__).resolve().parents[2]


def test_extension_is_built_where_it_must_be() -> None:
    """`make test` sets the variable where there is a compiler, so that a broken build is no heap of skipped tests."""
    if os.environ.get("VJEPA_FAST_REQUIRE_EXT") != "1":
        pytest.skip("VJEPA_FAST_REQUIRE_EXT=1 is not set")
    assert extension.load().path is not None, extension.load().reason


@needs_extension
@settings(max_examples=400)
@given(cases(), st.integers(0, 5))
def test_cpu_operators_equal_the_reference_to_the_bit(case: Case, spare: int) -> None:
    case.check(case.operators(spare=spare), spare)


@needs_extension
@pytest.mark.parametrize("case", EXAMPLES, ids=range(len(EXAMPLES)))
def test_chosen_cases_on_the_cpu(case: Case) -> None:
    case.check(case.operators())


@needs_extension
def test_threads_change_nothing() -> None:
    """Enough sequences for several tasks, with one and with several threads."""
    case = Case(PLAIN.masks, (16, 16, 16), tuple(range(80)), tuple(range(80)), 16)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            case.check(case.operators())
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The thread block of the CUDA kernels, run on the CPU phase by phase, with checks of every array access."""
    return load_emulator("emulated_block.cpp", tmp_path_factory.mktemp("emulator"))


@settings(max_examples=150)
@given(case=cases(), num_threads=st.sampled_from([1, 32, 128, 256]), stride=st.sampled_from([1, 255, 37]))
@example(case=EXAMPLES[1], num_threads=256, stride=255)
@example(case=EXAMPLES[2], num_threads=256, stride=37)
@example(case=EXAMPLES[5], num_threads=256, stride=37)
def test_thread_block_equals_the_reference_to_the_bit(
    emulator: ctypes.CDLL, case: Case, num_threads: int, stride: int
) -> None:
    """Threads of a phase in three orders: a phase that needed another one would differ."""
    case.check(emulate(emulator, case, num_threads, stride))


def test_thread_block_stays_within_the_capacity(emulator: ctypes.CDLL) -> None:
    lengths, context, target, cu_seqlens, totals = emulate(emulator, PLAIN, 128, 1)
    full = totals.tolist()
    small = emulate(emulator, PLAIN, 128, 1, capacity=(full[0] - 10, full[1] - 20))
    assert small[4].tolist() == full
    assert torch.equal(small[1], context[:-10]) and torch.equal(small[2], target[:-20])
    assert small[3].amax(1).tolist() == [full[0] - 10, full[1] - 20, sum(full) - 30]
    # Lengths that somebody made up.
    wild = np.array(lengths.numpy())
    wild[:, ::2] = 144
    wild[1, 1] = -5
    emulate(emulator, PLAIN, 128, 37, capacity=(600, 700), lengths=wild)


@needs_extension
@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers_of_the_generator(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    ops = mask_ops.operators()
    assert ops is not None
    assert ops.philox4x32(torch.tensor([counter, counter]), *key).tolist() == [list(expected)] * 2


@needs_extension
def test_operators_are_registered_as_torch_wants_them() -> None:
    ops = mask_ops.operators()
    assert ops is not None
    step, ids, members = PLAIN.tensors()
    lengths = ops.mask_lengths(step, ids, members, *PLAIN.key, -1)
    torch.library.opcheck(ops.mask_lengths.default, (step, ids, members, *PLAIN.key, -1))
    torch.library.opcheck(ops.mask_sample.default, (step, ids, lengths, *PLAIN.key, 400, 500))
    torch.library.opcheck(ops.philox4x32.default, (torch.arange(8).view(2, 4), 1, 2))


@needs_extension
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool) -> None:
    ops = mask_ops.operators()
    assert ops is not None
    *key, group = PLAIN.key

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def draw(step: Tensor, ids: Tensor, room: Tensor) -> tuple[Tensor, ...]:
        lengths = ops.mask_lengths(step, ids, ids, *key, group, 0)
        context, target, cu_seqlens, _ = ops.mask_sample(
            step, ids, lengths, *key, group, room.shape[0], room.shape[0] + 100
        )
        return context * 2, target, cu_seqlens

    step, ids, _ = PLAIN.tensors()
    for size in (400, 500):
        context, target, cu_seqlens = draw(step, ids, torch.empty(size))
        lengths = ops.mask_lengths(step, ids, ids, *PLAIN.key, 0)
        eager = ops.mask_sample(step, ids, lengths, *PLAIN.key, size, size + 100)
        assert torch.equal(context, eager[0] * 2) and torch.equal(target, eager[1])
        assert torch.equal(cu_seqlens, eager[2])


MASKS = [
    MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=4),
    MaskSpec(strategy="mixture"),
    MaskSpec(strategy="tube", max_temporal_keep=0.5),
]


def rows(batch: Any) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(mask, clip) -> (context ids, target ids)."""
    pairs = enumerate(zip(*batch._split(), strict=True))
    return {divmod(s, batch.batch_size): (c.tolist(), t.tolist()) for s, (c, t) in pairs}


@pytest.mark.parametrize("dispatch", ["ref", pytest.param("extension", marks=needs_extension)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_same_masks_on_any_number_of_ranks_and_after_a_restart(
    dispatch: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 to 3 of 24 clips in truncation groups of 12; each rank starts anew at step 2."""
    if dispatch == "ref":
        monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    cfg, grid = MaskConfig(masks=MASKS, group_size=12), (4, 6, 6)
    digest = hashlib.sha256()
    samplers = [MaskSampler(cfg, grid, seed=9) for _ in range(num_ranks)]
    for step in range(4):
        if step == 2:
            samplers = [MaskSampler(cfg, grid, seed=9) for _ in range(num_ranks)]
        parts = np.array_split(np.arange(24 * step, 24 * step + 24), num_ranks)
        found = [rows(sampler(step, part)) for sampler, part in zip(samplers, parts, strict=True)]
        for mask in range(len(MASKS)):
            for part, own in zip(parts, found, strict=True):
                for clip in range(len(part)):
                    digest.update(repr((int(part[clip]), mask, own[mask, clip])).encode())
    assert digest.hexdigest() == "85e14b102a60b6642b8c91d41390fb50a42a89df394c76092a626ae7a6845f16"


@needs_extension
def test_sampler_pads_to_a_capacity() -> None:
    sampler = MaskSampler(MaskConfig(masks=MASKS, truncate="none"), (4, 6, 6), seed=1)
    plain = sampler(0, range(3))
    total = len(plain.context_ids)
    padded = sampler(0, range(3), capacity=(total + 7, 9 * 144))
    by_hand = plain.padded((total + 7, 9 * 144))
    for batch in (padded, by_hand):
        assert batch.context_ids[:total].equal(plain.context_ids) and batch.context_ids[total:].tolist() == [0] * 7
        assert batch.cu_seqlens.equal(plain.cu_seqlens) and batch.cu_seqlens_context[-1] == total
        assert batch.context_rows[:total].equal(plain.context_rows) and batch.context_rows[total:].tolist() == [0] * 7
        assert batch.token_weights().sum() == pytest.approx(1)
        assert len(batch.token_weights()) == 9 * 144
        assert rows(batch.narrow(1, 3)) == rows(plain.narrow(1, 3))
    with pytest.raises(ValueError, match="more than the capacity"):
        sampler(0, range(3), capacity=(total - 1, 9 * 144))
    with pytest.raises(ValueError, match="do not fit a capacity"):
        plain.padded((total - 1, 9 * 144))


@needs_extension
def test_captured_form_equals_the_other() -> None:
    step, ids, members = PLAIN.tensors()
    context, target, cu_seqlens, totals = mask_ops.mask_sample_captured(
        PLAIN.specs, PLAIN.grid, step, ids, members, seed=PLAIN.seed, capacity=(500, 600), group_size=-1
    )
    expected = PLAIN.reference()
    wanted = [len(expected.context_ids), len(expected.target_ids)]
    assert totals.tolist() == wanted and cu_seqlens.equal(expected.cu_seqlens)
    assert context[: wanted[0]].equal(expected.context_ids) and target[: wanted[1]].equal(expected.target_ids)


@pytest.mark.parametrize(
    ("ids", "members", "message"),
    [([-1, 2], None, "a global sample number is -1"), ([1, 2], [2, 3], "sample 1 is not among the members")],
)
@pytest.mark.parametrize("dispatch", ["ref", pytest.param("extension", marks=needs_extension)])
def test_bad_samples(
    dispatch: str, ids: list[int], members: list[int] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch == "ref":
        monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    sampler = MaskSampler(MaskConfig(masks=MASKS), (4, 6, 6), 0)
    with pytest.raises(ValueError, match=message):
        sampler(0, ids, members=None if members is None else np.array(members))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device.*cuda.*torch.*GPU"):
        MaskSampler(MaskConfig(masks=MASKS), (4, 6, 6), 0)(0, [1], "cuda")


@pytest.mark.parametrize(
    ("environment", "num_warnings"), [({"VJEPA_FAST_EXT": "0"}, 0), ({"VJEPA_FAST_OPS": "ref"}, 0), ({}, 1)]
)
def test_without_the_extension_numpy_draws_the_same_masks(
    environment: dict[str, str], num_warnings: int, tmp_path: Path
) -> None:
    """In a process of its own, whose library is missing; one warning for two samplers."""
    script = (
        "import hashlib, pathlib, warnings\n"
        "from vjepa_fast.common import extension\n"
        f"extension.LIBRARY = pathlib.Path({str(tmp_path / '_C.so')!r})\n"
        "import vjepa_fast as vf\n"
        "from vjepa_fast.config.schema import MaskConfig\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        batch = vf.MaskSampler(MaskConfig(), (4, 8, 8), 7)(3, range(4))\n"
        "assert extension.load().path is None and extension.load().reason\n"
        "print(sum('masks are drawn by NumPy' in str(w.message) for w in caught), len(caught))\n"
        "print(hashlib.sha256(batch.context_ids.numpy().tobytes() + batch.target_ids.numpy().tobytes()).hexdigest())\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VJEPA_FAST_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **environment},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    counts, digest = done.stdout.split("\n")[:2]
    assert counts == f"{num_warnings} {num_warnings}"
    batch = MaskSampler(MaskConfig(), (4, 8, 8), 7)(3, range(4))
    ids = batch.context_ids.numpy().tobytes() + batch.target_ids.numpy().tobytes()
    assert digest == hashlib.sha256(ids).hexdigest()


@pytest.mark.gpu
@needs_extension
@settings(max_examples=1000)
@given(cases(), st.integers(0, 5))
def test_cuda_operators_equal_the_reference_to_the_bit(case: Case, spare: int) -> None:
    if not mask_ops.runs_on(torch.device("cuda")):
        pytest.skip("the extension has no CUDA kernels for this device")
    case.check(case.operators("cuda", spare), spare)


@pytest.mark.gpu
@needs_extension
def test_sampler_does_not_wait_for_the_gpu() -> None:
    device = torch.device("cuda")
    if not mask_ops.runs_on(device):
        pytest.skip("the extension has no CUDA kernels for this device")
    sampler = MaskSampler(MaskConfig(), (8, 16, 16), seed=3)
    expected = sampler(5, range(24))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = sampler(5, range(24), device)
            found_rows, weights = found.context_rows, found.token_weights()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert found.context_ids.device.type == found.cu_seqlens.device.type == "cuda"
    assert found.context_ids.cpu().equal(expected.context_ids) and found.target_ids.cpu().equal(expected.target_ids)
    assert found.cu_seqlens.cpu().equal(expected.cu_seqlens)
    assert found_rows.cpu().equal(expected.context_rows) and weights.cpu().equal(expected.token_weights())


@pytest.mark.gpu
@needs_extension
def test_replay_of_a_cuda_graph_draws_the_masks_of_its_step() -> None:
    device = torch.device("cuda")
    if not mask_ops.runs_on(device):
        pytest.skip("the extension has no CUDA kernels for this device")
    cfg, grid = MaskConfig(), (8, 16, 16)
    sampler = MaskSampler(cfg, grid, seed=3)
    step, ids = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(24, device=device)
    capacity = (48 * 1024, 48 * 2048)

    def draw() -> tuple[Tensor, ...]:
        return mask_ops.mask_sample_captured(
            sampler.specs, grid, step, ids, ids, seed=3, capacity=capacity, group_size=-1
        )

    draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context, target, cu_seqlens, totals = draw()
    for number in (7, 8):
        step.fill_(number)
        graph.replay()
        expected = sampler(number, range(24), capacity=capacity)
        assert context.cpu().equal(expected.context_ids) and target.cpu().equal(expected.target_ids)
        assert cu_seqlens.cpu().equal(expected.offsets)
        assert totals.tolist() == [sum(expected.context_lengths), sum(expected.target_lengths)]
