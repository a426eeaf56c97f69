"""Four processes that share the optimizer's work against four under DistributedDataParallel and against one."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.helpers import forked
from vjepa_fast.config.schema import Config
from vjepa_fast.distributed import parallel
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops.linear import shadow_of
from vjepa_fast.optim import flat_buffers, zero_comm
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.optim.zero import ShardedAdamWEMA
from vjepa_fast.train.monitor.health import _weight_figures
from vjepa_fast.train.speed.timing_trials import restoring_state
from vjepa_fast.train.step import TrainStep

STEPS = {"float32": 8, "bfloat16": 4, "accumulated": 4, "groups": 4, "outliers": 6, "rounded": 4}
SIZE, CLIPS = 4, 8

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "float32": {},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "accumulated": {"optimization": {"grad_accumulation": 2}},
    "groups": {"data": {"dataset_fpcs": [4, 2], "datasets": ["a", "b"]}},
    "outliers": {"data": {"dataset_fpcs": [4, 2], "datasets": ["a", "b"]}, "optimization": {"loss_reg_std_mult": 10.0}},
    "rounded": {"train": {"grad_dtype": "bfloat16"}},
}


def config(case: str, sharded: bool) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "model": {
            "model_name": "vit_tiny",
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 2,
            "pred_embed_dim": 24,
            "pred_depth": 2,
            "pred_num_heads": 2,
        },
        "data": {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [4], "batch_size": CLIPS},
        "optimization": {
            "ipe": 10,
            "epochs": 5,
            "warmup": 0,
            "lr": 1e-3,
            "start_lr": 1e-3,
            "ema": [0.9, 1.0],
            "clip_grad": 0.05,
        },
        "train": {"shard_optimizer": sharded},
    }
    for section, values in CASES[case].items():
        raw[section] |= values
    return Config.model_validate(raw)


def batch(cfg: Config, step: int, ids: range) -> tuple[list[torch.Tensor], list[MaskBatch]]:
    """Of all clips of a step those of `ids`; in the case `groups` short clips come in every other step, to the last
    processes only, and in the case `outliers` the first process has short and long ones."""
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(0, 256, (CLIPS, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)[ids.start : ids.stop]
    if cfg.optimization.loss_reg_std_mult is not None and ids.start == 0:
        halves = range(len(ids) // 2), range(len(ids) // 2, len(ids))
        masks = [
            MaskSampler(cfg.mask, (frames, 4, 4), seed=0)(step, half)
            for frames, half in zip((2, 1), halves, strict=True)
        ]
        return [clips[: len(halves[0])], clips[len(halves[0]) :, :2]], [
            dataclasses.replace(own, mask_token=number).with_weights(2) for number, own in enumerate(masks)
        ]
    if len(cfg.data.dataset_fpcs) == 1 or step % 2 or ids.start < CLIPS // 2:
        whole = MaskSampler(cfg.mask, (2, 4, 4), seed=0)(step, range(CLIPS)).with_weights(1)
        return [clips], [whole.narrow(ids.start, ids.stop)]
    masks = MaskSampler(cfg.mask, (1, 4, 4), seed=0)(step, ids)
    return [clips[:, :2]], [dataclasses.replace(masks, mask_token=1)]


def train_step(case: str, kind: str) -> TrainStep:
    cfg = config(case, kind == "zero")
    torch.manual_seed(0)
    model, groups = VJEPA.from_config(cfg), len(cfg.data.dataset_fpcs)
    if kind == "one":
        return TrainStep(model, cfg)
    if kind == "fsdp":
        parallel.shard(model, torch.device("cpu"), cfg.train.grad_dtype)
        return TrainStep(model, cfg, None, dist.get_world_size())
    return TrainStep(
        model,
        cfg,
        parallel.data_parallel(model, cfg, groups),
        dist.get_world_size(),
        parallel.optimizer_of(model, cfg, groups),
    )


def train(case: str, kind: str, ids: range) -> dict[str, Any]:
    step = train_step(case, kind)
    cfg = config(case, kind == "zero")
    losses = [float(step(number, *batch(cfg, number, ids)).loss) for number in range(STEPS[case])]
    step.optimizer.collect()
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in step.model.state_dict().items()
    }
    return {"losses": losses, "weights": weights}


def process(rank: int, folder: Path) -> int:
    torch.set_num_threads(1)
    # Each block makes a bucket of its own.
    flat_buffers.BUCKET_BYTES = 1
    share = CLIPS // dist.get_world_size()
    ids = range(rank * share, (rank + 1) * share)
    results = {f"{case} {kind}": train(case, kind, ids) for case in CASES for kind in ("ddp", "zero")}
    results["rounded fsdp"] = train("rounded", "fsdp", ids)
    results["seen"] = {"counts": counts(ids), "order": order(ids), "raised": raised(ids), "tried": tried(ids)}
    torch.save(results, folder / f"{rank}.pt")
    return 0


def counts(ids: range) -> dict[str, list[int]]:
    """Reductions of gradients in each of the first steps, alone and with micro-batches."""
    found: dict[str, list[int]] = {}
    original = zero_comm.reduce_scatter
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    # torch looks at annotations, and does not read strings.
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        calls.append(1)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    zero_comm.reduce_scatter = counted
    try:
        for case in ("float32", "accumulated"):
            for kind in ("ddp", "zero"):
                step = train_step(case, kind)
                if kind == "ddp":
                    step.forward.register_comm_hook(None, hook)  # type: ignore[operator]
                found[f"{case} {kind}"] = []
                for number in range(3):
                    calls.clear()
                    step(number, *batch(config(case, False), number, ids))
                    found[f"{case} {kind}"].append(len(calls))
    finally:
        zero_comm.reduce_scatter = original
    return found


def order(ids: range) -> dict[str, Any]:
    """What was sent when the backward was through, and which gathers the next forward waited for, in which order."""
    step = train_step("bfloat16", "zero")
    optimizer = step.optimizer
    assert isinstance(optimizer, ShardedAdamWEMA)
    inputs = batch(config("bfloat16", True), 0, ids)
    step(0, *inputs)
    waited: list[int] = []
    gathers = optimizer._weights._gathers
    original = zero_comm._Gather.wait

    def wait(self: zero_comm._Gather) -> None:
        if self._work is not None:
            waited.append(gathers.index(self))
        original(self)

    zero_comm._Gather.wait = wait  # type: ignore[method-assign]
    try:
        loss = step.model(*inputs).loss
        loss.backward()
    finally:
        zero_comm._Gather.wait = original  # type: ignore[method-assign]
    sent = len(optimizer._gradients._sent)
    try:
        step.model(*inputs).loss.backward()
        twice = "nothing"
    except RuntimeError as error:
        twice = str(error)
    return {
        "waited": waited,
        "gathers": len(gathers),
        "sent": sent,
        "buckets": len(optimizer._buckets),
        # After what lies outside of blocks come those of the target encoder.
        "trained": [gather.flat.tensors[0].requires_grad for gather in gathers[3:]],
        "twice": twice,
    }


def raised(ids: range) -> dict[str, Any]:
    """What is said to whoever reads what is out of date, and the figures of a run's health, which read what is not."""
    step = train_step("bfloat16", "zero")
    step(0, *batch(config("bfloat16", True), 0, ids))
    encoder = step.model.encoder
    weight = encoder.blocks[0].mlp.fc1.weight  # type: ignore[union-attr]
    readers = {
        "state_dict": step.model.state_dict,
        "copy": lambda: copy.deepcopy(encoder),
        "another dtype": lambda: shadow_of(weight, torch.float16),  # type: ignore[arg-type]
        "shadows": step.optimizer.write_shadows,
        "optimizer": step.optimizer.state_dict,
    }

    def look() -> dict[str, str]:
        said = {}
        for name, read in readers.items():
            try:
                read()
                said[name] = "nothing"
            except RuntimeError as error:
                said[name] = str(error)
        return said

    before, health = look(), _weight_figures(step.model)
    step.optimizer.refresh()
    after = _weight_figures(step.model)
    return (
        before
        | {f"{name}, refreshed": text for name, text in look().items()}
        | {"health": health, "health, refreshed": after}
    )


def tried(ids: range) -> dict[str, bool]:
    """What a step of a run is like after steps that were undone."""
    cfg, step = config("bfloat16", True), train_step("bfloat16", "zero")
    step(0, *batch(cfg, 0, ids))
    step.optimizer.refresh()
    moments = [{name: x.clone() for name, x in state.items()} for state in step.optimizer.state.values()]
    weights = [x.clone() for x in step.model.parameters()]
    losses = []
    with restoring_state(step):
        losses += [step(number, *batch(cfg, number, ids)).loss for number in (1, 2)]
    same = {
        "weights": all(map(torch.equal, weights, step.model.parameters())),
        "moments": all(
            torch.equal(x, state[name])
            for before, state in zip(moments, step.optimizer.state.values(), strict=True)
            for name, x in before.items()
        ),
    }
    losses += [step(number, *batch(cfg, number, ids)).loss for number in (1, 2)]
    return same | {"losses": torch.equal(torch.stack(losses[:2]), torch.stack(losses[2:]))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exchange")
    assert forked.launch(partial(process, folder=folder), SIZE) == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all weights over their norm."""
    assert a.keys() == b.keys()
    return float(sum((a[key] - b[key]).square().sum() for key in a) / sum(x.square().sum() for x in b.values())) ** 0.5


@pytest.mark.parametrize("case", ["float32", "bfloat16", "accumulated", "groups", "outliers"])
def test_as_data_parallel(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        zero, ddp = rank[f"{case} zero"], rank[f"{case} ddp"]
        assert max(abs(x - y) for x, y in zip(zero["losses"], ddp["losses"], strict=True)) <= 1e-6
        assert far(zero["weights"], ddp["weights"]) <= 1e-6
        assert far(zero["weights"], ranks[0][f"{case} zero"]["weights"]) == 0


@pytest.mark.parametrize("case", ["float32", "accumulated"])
def test_as_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    one = train(case, "one", range(CLIPS))
    for kind in ("ddp", "zero"):
        means = torch.tensor([rank[f"{case} {kind}"]["losses"] for rank in ranks], dtype=torch.float64).mean(0)
        assert ((means - torch.tensor(one["losses"])).abs() / means).max() <= 1e-6


def test_rounded_gradients(ranks: list[dict[str, Any]]) -> None:
    """Close to unrounded ones, and not the same."""
    exact = ranks[0]["float32 ddp"]
    for kind in ("ddp", "zero", "fsdp"):
        rounded = ranks[0][f"rounded {kind}"]
        differences = [abs(x - y) / y for x, y in zip(rounded["losses"], exact["losses"], strict=False)]
        assert len(differences) == 4 and 0 < max(differences) <= 1e-4


def test_one_reduction_a_bucket_and_step(ranks: list[dict[str, Any]]) -> None:
    """Whatever the number of micro-batches."""
    found = ranks[0]["seen"]["counts"]
    assert found["accumulated zero"] == found["float32 zero"] == [7, 7, 7]
    assert found["accumulated ddp"] == found["float32 ddp"]
    assert set(found["float32 ddp"]) == {1}


def test_beside_the_computation(ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]["seen"]["order"]
    assert seen["sent"] == seen["buckets"] == 7
    assert seen["waited"] == list(range(seen["gathers"]))
    assert seen["trained"] == [False] * 3 + [True] * 5
    assert "second backward" in seen["twice"]


def test_nobody_reads_what_is_out_of_date(ranks: list[dict[str, Any]]) -> None:
    said = ranks[0]["seen"]["raised"]
    for name in ("state_dict", "copy", "another dtype", "shadows"):
        assert "out of date" in said[name], name
        assert said[f"{name}, refreshed"] == "nothing"
    assert "collect()" in said["optimizer"]
    for rank in ranks:
        said = rank["seen"]["raised"]
        assert said["health"] == said["health, refreshed"] and float(said["health"]["target_gap"]) > 0


def test_undone_steps_leave_no_trace(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["seen"]["tried"] == {"weights": True, "moments": True, "losses": True}


def test_alone() -> None:
    """Without processes the optimizer has nothing to bring together."""
    step = train_step("float32", "one")
    assert type(step.optimizer) is AdamWEMA
    step.optimizer.refresh()
    with step.optimizer.no_sync():
        pass
