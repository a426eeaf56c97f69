"""Captured and replayed steps on a GPU; see test_graphs.py for what needs none."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from tests.helpers.graphed import CASES, assert_same, batch, config, expected, train_step
from vjepa_fast.train.speed import graphs
from vjepa_fast.train.speed.buckets import choose_buckets
from vjepa_fast.train.speed.graphs import GraphedStep, refusal

GPU_CASES = {
    "plain": {},
    "no truncation, variance term": {"truncate": "none", "reg_coeff": 0.1},
    "sincos, recomputed": {"use_rope": False, "activation_checkpointing": "full"},
    "recomputed selectively": {"activation_checkpointing": "selective"},
    "drop path": {"drop_path_rate": 0.5},
    "V-JEPA 2.1": {**CASES["V-JEPA 2.1"], "loss_reg_std_mult": 100.0},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_replays_equal_eager_steps_on_a_gpu(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several buckets, small as the batches are.
    monkeypatch.setattr(graphs, "UNIT", 8)
    monkeypatch.setattr(graphs, "NUM_BUCKETS", 2)
    cfg = config("bfloat16", **case)
    plain = train_step(cfg, "cuda")
    step = train_step(cfg, "cuda")
    assert refusal(step) is None
    graphed = GraphedStep(step, expected(cfg), pytest.fail)
    batches = [batch(number, cfg, "cuda") for number in range(20)]
    losses: list[list[float]] = []
    for some in (plain, graphed):
        results = []
        for number, (clips, masks) in enumerate(batches):
            torch.manual_seed(number)
            results.append(some(number, clips, masks))
            output, width = results[-1].output, plain.model.encoder.output_dim
            shape = output.packed_predictions.shape
            assert shape == (sum(masks.target_lengths), width) == output.packed_targets.shape
        losses.append([float(result.loss) for result in results])
        assert not any(result.skipped for result in results)
    assert len(graphed.buckets) == 2 and graphed.num_replayed == 16 and graphed.num_eager == 0
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert_same(graphed.train_step.model, plain.model, 3e-2)
    assert {float(state["step"]) for state in graphed.optimizer.state.values()} == {20.0}


@pytest.mark.gpu
def test_replays_wait_for_nothing() -> None:
    cfg = config("bfloat16")
    graphed = GraphedStep(train_step(cfg, "cuda"), expected(cfg), pytest.fail)
    batches = [batch(number, cfg, "cuda") for number in range(20)]
    for _ in range(3):
        for number, some in enumerate(batches):
            graphed(number, *some)
    assert all(bucket.replay is not None for bucket in graphed.buckets)
    before = graphed.num_replayed
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, some in enumerate(batches):
            graphed(number, *some)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphed.num_replayed == before + 20


@pytest.mark.gpu
def test_gradients_that_are_not_finite_on_a_gpu() -> None:
    cfg = config("bfloat16")
    graphed = GraphedStep(train_step(cfg, "cuda"), expected(cfg, 1), pytest.fail)
    model, some = graphed.train_step.model, batch(0, cfg, "cuda")
    for _ in range(4):
        graphed(0, *some)
    spoiled = model.predictor.predictor_norm.weight
    kept = spoiled.detach().clone()
    with torch.no_grad():
        spoiled.fill_(torch.inf)
    before = model.encoder.blocks[0].attn.qkv.weight.clone()
    assert graphed(0, *some).skipped == 1 and torch.equal(model.encoder.blocks[0].attn.qkv.weight, before)
    with torch.no_grad():
        spoiled.copy_(kept)
    assert graphed(0, *some).skipped == 0 and not torch.equal(model.encoder.blocks[0].attn.qkv.weight, before)


@pytest.mark.gpu
def test_buckets_share_their_memory() -> None:
    cfg = config("bfloat16", embed_dim=384, num_heads=6, pred_embed_dim=192, pred_num_heads=6, depth=6)
    sizes, held = expected(cfg), []
    for count in (1, 4):
        graphed = GraphedStep(train_step(cfg, "cuda"), sizes, pytest.fail)
        graphed._rooms = choose_buckets(sizes, count, 1.0, 8)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for number in [*range(20)] * 3:
            graphed(number, *batch(number, cfg, "cuda"))
        assert len(graphed.buckets) == count
        assert all(bucket.replay is not None for bucket in graphed.buckets)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved() - before)
        del graphed
    # Four times as much would be four pools.
    assert held[1] < 2 * held[0] + 2**25, held


@pytest.mark.gpu
def test_compiled_blocks_in_a_graph() -> None:
    cfg = config("bfloat16", compile_model=True)
    plain, graphed = train_step(cfg, "cuda"), GraphedStep(train_step(cfg, "cuda"), expected(cfg), pytest.fail)
    batches = [batch(number, cfg, "cuda") for number in range(12)]
    losses = [[float(some(n, *one).loss) for n, one in enumerate(batches)] for some in (plain, graphed)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and graphed.num_replayed > 0


@pytest.mark.gpu
def test_captured_again_after_optimizer_state_is_loaded() -> None:
    cfg = config("bfloat16")
    graphed = GraphedStep(train_step(cfg, "cuda"), expected(cfg), pytest.fail)
    one = batch(0, cfg, "cuda")
    for number in range(4):
        graphed(number, *one)
    graphed.optimizer.load_state_dict(copy.deepcopy(graphed.optimizer.state_dict()))
    for number in range(4, 8):
        graphed(number, *one)
    assert graphed.num_replayed == 4 and not graphed.stopped
