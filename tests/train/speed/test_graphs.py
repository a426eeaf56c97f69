"""Steps as CUDA graphs, on the CPU with recordings in their place; test_graphs_gpu.py has the graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.helpers.graphed import CASES, assert_same, batch, config, expected, train_step
from tests.ops.attention.stand_ins import only
from tests.train.speed.recorded import RecordedStep, adamw_ema_by_device_
from vjepa_fast.checkpoints import meta_format
from vjepa_fast.config.schema import Config
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.ops.attention import choice
from vjepa_fast.optim import adamw_ema
from vjepa_fast.train.speed import graphs
from vjepa_fast.train.speed.buckets import choose_buckets
from vjepa_fast.train.speed.graphs import GraphedStep, refusal
from vjepa_fast.train.step import TrainStep


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Attention that reads lengths from tensors only; two buckets at first, captured after one step each."""
    monkeypatch.setattr(choice, "time_ms", lambda *_: 1.0)
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    monkeypatch.setattr(graphs, "NUM_BUCKETS", 2)
    monkeypatch.setattr(graphs, "UNIT", 8)
    with only(monkeypatch, ("fa2",), tmp_path):
        yield


def by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that reads its values from tensors only, from here on."""
    monkeypatch.setattr(adamw_ema, "use_triton", lambda _: True)
    monkeypatch.setattr(adamw_ema, "adamw_ema_", adamw_ema_by_device_)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_replays_equal_eager_steps(case: dict, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(**case)
    plain, graphed = train_step(cfg), RecordedStep(train_step(cfg), expected(cfg), pytest.fail)
    results = []
    for run in (plain, graphed):
        some = []
        for step in range(10):
            torch.manual_seed(step)
            result = run(step, *batch(step, cfg))
            # The target encoder's features lie in memory that the next step overwrites.
            some.append((result, result.output.packed_targets.clone()))
        results.append(some)
        by_device(monkeypatch)
    half = cfg.model.dtype != "float32"
    for (oracle, oracle_targets), (ours, targets) in zip(*results, strict=True):
        assert float(ours.loss) == pytest.approx(float(oracle.loss), rel=2e-2 if half else 1e-6)
        assert float(ours.grad_norm) == pytest.approx(float(oracle.grad_norm), rel=5e-2 if half else 1e-5)
        assert (ours.lr, ours.weight_decay, ours.momentum) == (oracle.lr, oracle.weight_decay, oracle.momentum)
        assert ours.output.packed_predictions.shape == oracle.output.packed_predictions.shape
        torch.testing.assert_close(targets, oracle_targets, rtol=1e-4, atol=0.2 if half else 1e-5)
    assert len(graphed.buckets) == 2 and all(bucket.replay for bucket in graphed.buckets)
    assert graphed.num_replayed == 8 and graphed.num_eager == 0
    assert_same(graphed.train_step.model, plain.model, 2e-2 if half else 1e-6)


def recorded(cfg: Config, monkeypatch: pytest.MonkeyPatch, num_steps: int = 20) -> RecordedStep:
    """With buckets for `num_steps` steps, which say nothing."""
    by_device(monkeypatch)
    return RecordedStep(train_step(cfg), expected(cfg, num_steps) if num_steps else [], pytest.fail)


def run(some: GraphedStep | TrainStep, steps: Iterable[int], cfg: Config) -> list[float]:
    return [float(some(step, *batch(step, cfg)).loss) for step in steps]


def test_outlying_losses_are_skipped_in_replays_too(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(loss_reg_std_mult=0.5)
    assert cfg.optimization.ipe is not None
    cfg.optimization.ipe = 5
    plain, graphed = train_step(cfg), RecordedStep(train_step(cfg), expected(cfg), pytest.fail)
    skipped = []
    for some in (plain, graphed):
        skipped.append([int(some(step, *batch(step, cfg)).skipped) for step in range(14)])
        by_device(monkeypatch)
    assert skipped[0] == skipped[1]
    # None in the first epoch, and then some but not all.
    assert not any(skipped[0][:5]) and 0 < sum(skipped[0]) < 9
    assert graphed.num_replayed > 0
    assert_same(graphed.train_step.model, plain.model, 1e-6)


def test_gradients_that_are_not_finite(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    graphed = recorded(cfg, monkeypatch, 1)
    model, optimizer = graphed.train_step.model, graphed.optimizer
    same = [batch(0, cfg)] * 5
    for step in range(3):
        graphed(step, *same[step])
    # In the predictor, so that the target encoder stays finite.
    spoiled = model.predictor.predictor_norm.weight
    kept = spoiled.detach().clone()
    with torch.no_grad():
        spoiled.fill_(torch.inf)
    before = {name: x.clone() for name, x in model.named_parameters()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    result = graphed(3, *same[3])
    assert graphed.num_replayed == 3 and result.skipped == 1 and optimizer.skipped == 1
    for name, x in model.named_parameters():
        trained = model.get_parameter(name).requires_grad or "pos_embed" in name
        assert torch.equal(x, before[name]) == trained, name
    for state, mean in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], mean) and state["step"] == 3
    with torch.no_grad():
        spoiled.copy_(kept)
    assert graphed(4, *same[4]).skipped == 0 and graphed.num_replayed == 4


def test_figures_are_kept_and_outputs_are_of_the_step(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    graphed = recorded(cfg, monkeypatch)
    results = [graphed(step, *batch(step, cfg)) for step in range(6)]
    losses = [float(result.loss) for result in results]
    assert len(set(losses)) == 6 and graphed.num_replayed >= 2
    assert losses == run(recorded(cfg, monkeypatch), range(6), cfg)
    assert results[-1].output.masks[0].target_ids.equal(batch(5, cfg)[1].target_ids)


def test_batches_that_fit_no_bucket(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    monkeypatch.setattr(graphs, "NUM_MISSES", 3)
    sizes = expected(cfg)
    smallest = min(range(20), key=lambda step: sizes[step].context)
    others = [step for step in range(20) if not sizes[step].fits(sizes[smallest].rounded(8))][:6]
    by_device(monkeypatch)
    graphed = RecordedStep(train_step(cfg), [sizes[smallest]], pytest.fail)
    oracle = train_step(cfg)
    order = [smallest, *others[:3], smallest, *others[:3], smallest]
    assert run(graphed, order, cfg) == pytest.approx(run(oracle, order, cfg), rel=1e-5)
    assert graphed.num_eager == 3 and len(graphed.buckets) == 2
    assert graphed.buckets[1].room == Sizes.around(sizes[step] for step in others[:3]).rounded(8)
    assert graphed.num_replayed == 4
    # No more than so many.
    monkeypatch.setattr(graphs, "MAX_BUCKETS", 2)
    graphed.buckets.pop()
    graphed.buckets *= 2
    run(graphed, others[:4], cfg)
    assert graphed.num_eager == 7 and len(graphed.buckets) == 2


def test_buckets_without_sizes_to_expect(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    monkeypatch.setattr(graphs, "NUM_MISSES", 4)
    graphed = recorded(cfg, monkeypatch, 0)
    order = [0, 1, 2, 3] * 3
    assert run(graphed, order, cfg) == pytest.approx(run(train_step(cfg), order, cfg), rel=1e-5)
    assert graphed.num_eager == 4 and len(graphed.buckets) == 2 and graphed.num_replayed == 6


def test_the_cheapest_bucket_that_holds_a_batch_serves_it(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    graphed = recorded(cfg, monkeypatch)
    for step in range(6):
        clips, masks = batch(step, cfg)
        before = [(bucket.num_runs, id(bucket.figures)) for bucket in graphed.buckets]
        graphed(step, clips, masks)
        holding = [b.room for b in graphed.buckets if Sizes.of(masks).fits(b.room)]
        used = [
            b.room
            for b, was in zip(graphed.buckets, before or [(0, id(None))] * 2, strict=True)
            if (b.num_runs, id(b.figures)) != was or b.masks.cu_seqlens_context[-1] == sum(masks.context_lengths)
        ]
        assert min(room.context for room in holding) in [room.context for room in used]


def brute_force(seen: list[Sizes], cost: float) -> float:
    """Least waste of two buckets that each serve neighbours."""
    ordered = sorted(seen)

    def waste(part: list[Sizes]) -> float:
        room = Sizes.around(part)
        return sum(cost * (room.context - s.context) + room.target - s.target for s in part)

    return min(waste(ordered), *(waste(ordered[:k]) + waste(ordered[k:]) for k in range(1, len(ordered))))


@pytest.mark.parametrize("cost", [1.0, 15.0])
def test_chosen_buckets_waste_least(cost: float) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 500, (12, 2), generator=generator).tolist()
    seen = [Sizes(context, target, 1 + context // 2, 1 + target // 2, 9) for context, target in drawn]
    rooms = choose_buckets(seen, 2, cost)
    assert len(rooms) == 2 and all(any(s.fits(room) for room in rooms) for s in seen)
    wasted = sum(min(cost * (r.context - s.context) + r.target - s.target for r in rooms if s.fits(r)) for s in seen)
    assert wasted <= brute_force(seen, cost)
    assert choose_buckets(seen, 12, cost)[0].context == min(seen).context
    assert choose_buckets(seen[:1] * 5, 4, cost, unit=64) == [seen[0].rounded(64)]


def test_somebody_writes_to_parameters(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-precision copies that a recording multiplies with follow."""
    cfg = config("bfloat16")
    graphed, oracle = recorded(cfg, monkeypatch, 1), train_step(cfg)
    for some in (graphed, oracle):
        run(some, [0] * 3, cfg)
        model = some.model if isinstance(some, TrainStep) else some.train_step.model
        with torch.no_grad():
            model.predictor.predictor_proj.weight.mul_(100)
    expected_loss = run(oracle, [0], cfg)
    assert expected_loss[0] > 2
    assert run(graphed, [0], cfg) == pytest.approx(expected_loss, rel=2e-2)
    assert graphed.num_replayed == 3


@pytest.mark.parametrize("change", ["load", "move"])
def test_recordings_of_other_memory_are_dropped(change: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    graphed, oracle = recorded(cfg, monkeypatch, 1), train_step(cfg)
    for some in (graphed, oracle):
        run(some, [0] * 3, cfg)
        step = some if isinstance(some, TrainStep) else some.train_step
        if change == "load":
            step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        else:
            step.model.encoder.norm.weight.data = step.model.encoder.norm.weight.data.clone()
    assert run(graphed, [0] * 3, cfg) == pytest.approx(run(oracle, [0] * 3, cfg), rel=1e-5)
    assert graphed.num_replayed == 4 and graphed.num_eager == 0
    assert_same(graphed.train_step.model, oracle.model, 1e-5)


def test_a_checkpoint_goes_on(on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What replays write is what the optimizer saves; a run goes on from it with or without graphs."""
    cfg = config()
    graphed = recorded(cfg, monkeypatch)
    run(graphed, range(4), cfg)
    meta_format.save_checkpoint(
        tmp_path / "latest.pt",
        graphed.train_step.model,
        graphed.optimizer,
        epoch=0,
        loss=0.0,
        batch_size=3,
        world_size=1,
        lr=1e-3,
    )
    assert {float(state["step"]) for state in graphed.optimizer.state.values()} == {4.0}
    for group in graphed.optimizer.param_groups:
        assert group["lr"] == graphed.train_step.schedules.lr(3)
    losses = run(graphed, range(4, 8), cfg)
    for resumed in (train_step(cfg), RecordedStep(train_step(cfg), expected(cfg), pytest.fail)):
        step = resumed if isinstance(resumed, TrainStep) else resumed.train_step
        meta_format.load_checkpoint(tmp_path / "latest.pt", step.model, step.optimizer)
        assert run(resumed, range(4, 8), cfg) == pytest.approx(losses, rel=1e-5)


class Fails(RecordedStep):
    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        # Ending a capture that something broke is an error too, and the one that arrives.
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("capture was invalidated")


def test_a_capture_that_fails(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    by_device(monkeypatch)
    said: list[str] = []
    graphed, oracle = Fails(train_step(cfg), expected(cfg), said.append), train_step(cfg)
    assert run(graphed, range(6), cfg) == pytest.approx(run(oracle, range(6), cfg), rel=1e-5)
    assert said == [
        "steps run without CUDA graphs from here on: a capture failed: operation not permitted when stream is capturing"
    ]
    assert graphed.num_replayed == 0 and graphed.num_eager >= 3


def test_hooks_that_come_later_end_the_captures(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    by_device(monkeypatch)
    said: list[str] = []
    graphed = RecordedStep(train_step(cfg), expected(cfg, 1), said.append)
    run(graphed, [0], cfg)
    seen: list[Tensor] = []
    graphed.train_step.model.predictor.predictor_proj.bias.register_hook(seen.append)
    run(graphed, [0, 0], cfg)
    assert len(seen) == 2 and graphed.num_replayed == 0
    assert said == [
        "steps run without CUDA graphs from here on: predictor.predictor_proj.bias has a hook, which a "
        "replay would not call"
    ]


def test_batches_of_other_kinds_run_eagerly(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    by_device(monkeypatch)
    said: list[str] = []
    graphed = RecordedStep(train_step(cfg), expected(cfg), said.append)
    clips, masks = batch(0, cfg)
    graphed(0, [clips], [masks])
    for _ in range(2):
        graphed(1, clips[:2], masks.narrow(0, 2))
        graphed(2, [clips[:1], clips[1:]], [masks.narrow(0, 1), masks.narrow(1, 3)])
    assert graphed.num_eager == 4
    assert said == [
        "a batch of another shape than the first runs without a CUDA graph",
        "a batch with clips of several lengths runs without a CUDA graph",
    ]


def on_gpu(monkeypatch: pytest.MonkeyPatch, cfg: Config) -> TrainStep:
    """A step that believes in a GPU as far as `refusal` looks."""
    step = train_step(cfg)
    parameter = step.model.encoder.patch_embed.proj.weight
    monkeypatch.setattr(
        type(step.model),
        "parameters",
        lambda self: iter([SimpleNamespace(device=torch.device("cuda"), dtype=parameter.dtype)]),
    )
    monkeypatch.setattr(graphs, "use_triton", lambda _: True)
    return step


def optimizer_of_another_kind(step: TrainStep) -> None:
    step.optimizer = torch.optim.AdamW([torch.zeros(1)])  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("why", "settings", "change", "num_groups"),
    [
        (None, {}, None, 1),
        ("2 lengths", {}, None, 2),
        ("loss scale", {"dtype": "float16"}, None, 1),
        ("cuts batches up", {}, lambda step: setattr(step, "num_micro", 2), 1),
        ("recomputed blocks", {"drop_path_rate": 0.1, "activation_checkpointing": "selective"}, None, 1),
        ("optimizer is AdamW,", {}, optimizer_of_another_kind, 1),
        ("encoder.blocks.0 has a hook", {}, lambda step: step.model.encoder.blocks[0].register_forward_hook(print), 1),
        ("the optimizer has a hook", {}, lambda step: step.optimizer.register_step_post_hook(print), 1),
        ("model.attention=sdpa cannot serve", {"attention": "sdpa"}, None, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_graphs_cannot_serve(
    why: str | None,
    settings: dict,
    change: Callable[[TrainStep], object] | None,
    num_groups: int,
    on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = on_gpu(monkeypatch, config(**settings))
    if change is not None:
        change(step)
    found = refusal(step, num_groups)
    assert found is None if why is None else (found is not None and why in found and "\n" not in found), found


def test_attention_that_must_know_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    found = refusal(on_gpu(monkeypatch, config()))
    assert found is not None and found.startswith("no attention back end serves float32")


def test_on_a_cpu_there_are_none() -> None:
    assert refusal(train_step(config())) == "CUDA graphs need a GPU, and the model is on the cpu"
