"""Parallel models: replicated (DDP; ZeRO, which needs no wrapper) or sharded (FSDP2).

FSDP2 is used as torchtitan does: every transformer block is a unit whose parameters are gathered before it runs and
freed after, forward and backward, and what is left is one more, gathered for the whole step. The target encoder is cut
in the same way as the encoder, so that each process moves its shards of it without asking anybody. What is gathered are
the fp32 masters; each linear layer makes its half-precision copy of them, and norms, biases and embeddings stay in fp32
as without shards. So the arithmetic is that of DDP, but for the order in which gradients are added up. (A
MixedPrecisionPolicy would send half as many bytes, and round everything that is gathered.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops.linear import Linear
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.optim.dtensors import gather
from vjepa_fast.optim.zero import ShardedAdamWEMA


def data_parallel(model: VJEPA, cfg: Config, num_groups: int) -> DistributedDataParallel | None:
    """A model whose gradients are averaged over all processes; None where the optimizer does that.

    The target encoder has no gradients, so it has no part in it.

    Args:
        model: on the device of this process.
        cfg: of the run.
        num_groups: frames-per-clip groups of videos.
    """
    if cfg.train.shard_optimizer:
        return None
    # Nobody must wait for a gradient that never comes, nor for a buffer that is a function of the step everywhere.
    ignored = [*without_gradient(model, cfg, num_groups), "context_scale"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    # The search for unused parameters walks through the graph at each step.
    wrapped = DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=bool(optional(model, cfg, num_groups))
    )
    if cfg.train.grad_dtype == "bfloat16":
        # Under its own name torch takes this hook with NCCL only, though gloo adds bfloat16 up too.
        wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(None, bucket))  # type: ignore[arg-type]
    return wrapped


def optimizer_of(model: VJEPA, cfg: Config, num_groups: int) -> Callable[..., AdamWEMA]:
    """What makes the optimizer of one of several processes, for TrainStep. Args as data_parallel."""
    if not cfg.train.shard_optimizer:
        return AdamWEMA
    return partial(
        ShardedAdamWEMA,
        without_gradient=without_gradient(model, cfg, num_groups),
        optional=optional(model, cfg, num_groups),
        grad_dtype=getattr(torch, cfg.train.grad_dtype),
    )


def optional(model: VJEPA, cfg: Config, num_groups: int) -> list[str]:
    """Parameters that a step may do without: mask tokens of frames-per-clip groups that none of its clips is of."""
    if num_groups == 1 or cfg.model.mask_token_by == "mask":
        return []
    return [f"predictor.mask_tokens.{index}" for index in range(len(model.predictor.mask_tokens))]


def shard(model: VJEPA, device: torch.device, grad_dtype: str = "float32") -> None:
    """Keep this process's shard of every parameter only, in place; parameters become DTensors. A collective.

    Args:
        model: the same on all processes, also where it lies: a unit at a time is moved to the device.
        device: of this process.
        grad_dtype: in which gradients travel and are added up.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, grad_dtype))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    for blocks in (model.encoder.blocks, model.target_encoder.blocks, model.predictor.predictor_blocks):
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, Linear):
            module.gathered = True


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether its parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_copy(model: VJEPA) -> VJEPA | None:
    """A sharded model put together in the memory of the first process's host; None on the others. A collective."""
    first = dist.get_rank() == 0
    state = gather(model.state_dict(), keep=first)
    if not first:
        return None
    with torch.device("meta"):
        copy = VJEPA(model.cfg, **model.loss_options)
    copy.load_state_dict(state, assign=True)
    if model.cfg.return_all_tokens:
        copy.register_buffer("context_scale", model.context_scale.detach().cpu(), persistent=False)
    return copy


def without_gradient(model: VJEPA, cfg: Config, num_groups: int) -> list[str]:
    """Trained parameters that no mask, frames-per-clip group, image or level uses."""
    used = len(cfg.mask.masks) if cfg.model.mask_token_by == "mask" else num_groups
    unused = [f"predictor.mask_tokens.{index}" for index in range(used, len(model.predictor.mask_tokens))]
    if cfg.img_data is None:
        unused += [
            name for name, _ in model.named_parameters() if "img_mod_embed" in name or ("patch_embed_img" in name)
        ]
    if cfg.model.n_output_distillation is not None:
        norms = {id(parameter) for norm in model.encoder.level_norms for parameter in norm.parameters()}
        unused += [
            f"encoder.norms_block.{name}"
            for name, parameter in model.encoder.norms_block.named_parameters()
            if id(parameter) not in norms
        ]
    return unused
