"""The model of a run wrapped for several processes: whole in each of them (DDP), or in shards (FSDP2).

FSDP2 is used as torchtitan does: every transformer block is a unit whose parameters are gathered before it runs and
freed after, forward and backward, and what is left is one more, gathered for the whole step. The target encoder is cut
in the same way as the encoder, so that each process moves its shards of it without asking anybody. What is gathered are
the fp32 masters; each linear layer makes its half-precision copy of them, and norms, biases and embeddings stay in fp32
as without shards. So the arithmetic is that of DDP, but for the order in which gradients are added up. (A
MixedPrecisionPolicy would send half as many bytes, and round everything that is gathered.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops.linear import Linear


def data_parallel(model: VJEPA, cfg: Config, num_groups: int) -> DistributedDataParallel:
    """A model whose gradients are averaged over all processes.

    Args:
        model: on the device of this process.
        cfg: of the run.
        num_groups: frames-per-clip groups of videos.
    """
    # Nobody must wait for a gradient that never comes.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, without_gradient(model, cfg, num_groups))
    return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=num_groups > 1)


def shard(model: VJEPA, device: torch.device) -> None:
    """Keep this process's shard of every parameter only, in place; parameters become DTensors. A collective.

    Args:
        model: the same on all processes, also where it lies: a unit at a time is moved to the device.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    for blocks in (model.encoder.blocks, model.target_encoder.blocks, model.predictor.predictor_blocks):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, Linear):
            module.gathered = True


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether its parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def whole_copy(model: VJEPA) -> VJEPA:
    """A sharded model put together on the host's memory of the first process; a collective. Others get one of no use.

    One parameter at a time is in the memory of the device.
    """
    with torch.device("meta"):
        copy = VJEPA(model.cfg)
    copy.to_empty(device="cpu")
    for parameter, mine in zip(model.state_dict().values(), copy.state_dict().values(), strict=True):
        mine.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
    return copy


def without_gradient(model: VJEPA, cfg: Config, num_groups: int) -> list[str]:
    """Trained parameters that no mask, frames-per-clip group, image or level uses."""
    used = len(cfg.mask.masks) if cfg.model.mask_token_by == "mask" else num_groups
    unused = [f"predictor.mask_tokens.{index}" for index in range(used, len(model.predictor.mask_tokens))]
    if cfg.img_data is None:
        unused += [name for name, _ in model.named_parameters() if "img_mod_embed" in name or (
            "patch_embed_img" in name)]
    if cfg.model.n_output_distillation is not None:
        norms = {id(parameter) for norm in model.encoder.level_norms for parameter in norm.parameters()}
        unused += [f"encoder.norms_block.{name}" for name, parameter in
                   model.encoder.norms_block.named_parameters() if id(parameter) not in norms]
    return unused
