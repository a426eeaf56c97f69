"""AdamWEMA on parameters that are shards: two processes step as one does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from tests.helpers import forked
from tests.optim.adamw_runs import give_gradients, gradients_of_step, make_model, our_step
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.optim import dtensors
from vjepa_fast.optim.adamw_ema import AdamWEMA


def test_shards_of_shards_are_seen(tmp_path: Path):
    """Data parallelism over tensor parallelism splits one dimension twice."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp", "tp", "copies"))
        placements = [_StridedShard(0, split_factor=1), Shard(0), Replicate()]
        sharded = DTensor.from_local(torch.ones(4, 2), mesh, placements, run_check=False)
        assert dtensors.shards_of(sharded) == (mesh, (0, 1))
        assert dtensors.shards_of(torch.ones(2)) == (None, ())
    finally:
        dist.destroy_process_group()


def sharded(model: VJEPA, mesh: dist.DeviceMesh) -> VJEPA:
    """Every parameter split over the first dimension; that of the mask tokens is 1, so one process has nothing."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            parts = nn.Parameter(
                distribute_tensor(parameter.detach(), mesh, [Shard(0)]), requires_grad=parameter.requires_grad
            )
            setattr(module, name, parts)
    return model


def sharded_process(rank: int, folder: str, path: str) -> None:
    torch.set_num_threads(1)
    os.environ["VJEPA_FAST_OPS"] = path
    if path == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    # A plain copy in place of nn.ParameterList entries keeps the names; see gradients_of_step.
    names = gradients_of_step(model, 0).keys()
    shapes = make_model()
    model = sharded(model, mesh)
    # Below the norm of each network's gradients, of which each process holds a part.
    optimizer = AdamWEMA(model, lr=1e-3, clip_norm=10.0)
    norms = []
    for step in range(4):
        grads = gradients_of_step(shapes, step)
        if step == 2:
            # Only the second process holds this element.
            grads["encoder.norm.bias"][-1] = torch.nan
        for name, parameter in model.named_parameters():
            parameter.grad = distribute_tensor(grads[name], mesh, [Shard(0)]) if name in names else None
        our_step(optimizer, step)
        norms.append((float(optimizer.grad_norm), float(optimizer.skipped)))
    if rank == 1:
        token = model.predictor.mask_tokens[0]
        assert isinstance(token, DTensor) and token.to_local().numel() == 0
        assert optimizer.state[token]["step"] == 3
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    moments = {i: s["exp_avg"].full_tensor() for i, s in optimizer.state_dict()["state"].items()}
    torch.save(
        {"weights": weights, "moments": moments, "norms": norms, "launched": sorted(dispatch.launches)},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("path", ["triton", "ref"])
def test_shards_step_as_one(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch):
    if path == "triton":
        pytest.importorskip("triton")
    whole = make_model()
    optimizer = AdamWEMA(whole, lr=1e-3, clip_norm=10.0)
    norms = []
    monkeypatch.setenv("VJEPA_FAST_OPS", "ref")
    for step in range(4):
        grads = gradients_of_step(whole, step)
        if step == 2:
            grads["encoder.norm.bias"][-1] = torch.nan
        give_gradients(whole, grads)
        our_step(optimizer, step)
        norms.append((float(optimizer.grad_norm), float(optimizer.skipped)))
    forked.start_processes(sharded_process, (str(tmp_path), path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        assert found["norms"] == [pytest.approx(pair, rel=1e-5, nan_ok=True) for pair in norms]
        assert found["launched"] == (
            ["_adamw_ema_factors_kernel", "_adamw_ema_kernel", "_sum_of_squares_kernel"] if path == "triton" else []
        )
        for name, parameter in whole.named_parameters():
            assert (found["weights"][name] - parameter).norm() <= 1e-6 * parameter.norm(), name
        for index, state in optimizer.state_dict()["state"].items():
            expected = state["exp_avg"]
            assert (found["moments"][index] - expected).norm() <= 1e-6 * expected.norm()
