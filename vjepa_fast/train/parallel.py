"""The model of a run wrapped for several processes."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA


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
