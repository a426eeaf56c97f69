"""The reference's training step, run from a checkout of facebookresearch/vjepa2; nothing of it is copied.

`timm` is needed by one import of theirs alone, for a function that is never called without drop path; a stand-in takes
its place.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa_fast.bench.steps import OurStep
from vjepa_fast.common.checkouts import import_environment
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.models.sizes import size_of

REFERENCE_COMMIT = "c2963a4"
"""What the comparisons were written against."""

_MODULES = {
    "vit": "src.models.vision_transformer",
    "predictor": "src.models.predictor",
    "wrappers": "src.utils.wrappers",
    "masks": "src.masks.multiseq_multiblock3d",
    "mask_utils": "src.masks.utils",
    "schedulers": "src.utils.schedulers",
    "utils": "app.vjepa.utils",
}
_PARTS = ("encoder", "predictor", "target_encoder")


def check_checkout(folder: Path) -> Path:
    """The folder, resolved.

    Raises:
        UserError: it is not a checkout of facebookresearch/vjepa2.
    """
    root = folder.expanduser().resolve()
    if not root.is_dir():
        raise UserError(
            f"--reference: {folder} is not a folder; give a checkout of https://github.com/facebookresearch/vjepa2"
        )
    for name in _MODULES.values():
        path = Path(*name.split(".")).with_suffix(".py")
        if not (root / path).is_file():
            raise UserError(
                f"--reference: {folder} has no {path}, so it is no checkout of facebookresearch/vjepa2; "
                "git clone https://github.com/facebookresearch/vjepa2 and give that folder"
            )
    return root


@functools.cache
def load_modules(root: Path) -> types.SimpleNamespace:
    """The reference's modules: vit, predictor, wrappers, masks, mask_utils, schedulers, utils."""
    with import_environment(root):
        return types.SimpleNamespace(**{key: importlib.import_module(name) for key, name in _MODULES.items()})


def normalise(clip: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, T, H, W, 3] -> [B, 3, T, H, W], (x - 255 mean) / (255 std) with the constants rounded to fp32."""
    mean, std = (
        torch.tensor(values, device=clip.device) * 255.0 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return ((clip.to(dtype) - mean.to(dtype)) / std.to(dtype)).permute(0, 4, 1, 2, 3)


def build_networks(modules: types.SimpleNamespace, cfg: Config) -> nn.ModuleDict:
    """`encoder`, `predictor` and `target_encoder` behind the reference's wrappers for several sequences.

    They have the reference's own initialisation, from torch's global generator, on the default device.
    """
    size, model = size_of(cfg.model), cfg.model
    assert model.crop_size is not None
    shared = {
        "img_size": model.crop_size,
        "patch_size": model.patch_size,
        "num_frames": model.num_frames,
        "tubelet_size": model.tubelet_size,
        "uniform_power": model.uniform_power,
        "use_rope": model.use_rope,
        "wide_silu": model.wide_silu,
        "use_sdpa": True,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
    }
    encoder = modules.wrappers.MultiSeqWrapper(
        modules.vit.VisionTransformer(
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            mlp_ratio=size.mlp_ratio,
            use_silu=model.use_silu,
            **shared,
        )
    )
    predictor = modules.wrappers.PredictorMultiSeqWrapper(
        modules.predictor.VisionTransformerPredictor(
            embed_dim=size.embed_dim,
            predictor_embed_dim=model.pred_embed_dim,
            depth=model.pred_depth,
            num_heads=model.pred_num_heads or size.num_heads,
            mlp_ratio=4.0,
            use_silu=model.use_pred_silu,
            use_mask_tokens=True,
            num_mask_tokens=model.num_mask_tokens,
            zero_init_mask_tokens=model.zero_init_mask_tokens,
            **shared,
        )
    )
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    return nn.ModuleDict({"encoder": encoder, "predictor": predictor, "target_encoder": target_encoder})


class ReferenceStep:
    """The reference's step on the batches and from the weights of one of ours.

    Its modules, optimizer factory and schedules in the order of its training loop (app/vjepa/train.py:424-487), in one
    process without its DDP wrappers. Its clips are normalised beforehand, as its data workers do.

    Args:
        root: the checkout.
        ours: where weights, clips and masks are taken from, before its first step.
        checkpointing: recompute activations, as all of the reference's configs do.
        cudnn_attention: allow cuDNN's attention, which torch may prefer on a GPU and which plans anew for each shape.
        compiled: torch.compile of every block. Its own compile_model compiles whole networks, which takes minutes and
            starts again with every few new token counts; the blocks hold nearly all of the work and share one result.
    """

    def __init__(
        self, root: Path, ours: OurStep, *, checkpointing: bool, cudnn_attention: bool = True, compiled: bool = False
    ) -> None:
        modules, workload = load_modules(root), ours.workload
        cfg = workload.config
        device = ours.clips[0].device
        self.networks = self._networks(modules, ours)
        for network in self.networks.values():
            backbone: Any = network.backbone
            backbone.use_activation_checkpointing = checkpointing
            for block in backbone.predictor_blocks if hasattr(backbone, "predictor_blocks") else backbone.blocks:
                if compiled:
                    block.compile()
        self.apply_masks = modules.mask_utils.apply_masks
        self.dtype, self.device = workload.torch_dtype, device
        self.mixed_precision = self.dtype != torch.float32
        opt = cfg.optimization
        with warnings.catch_warnings():
            # Its GradScaler is the one that torch has renamed, and without a GPU it says that it does nothing.
            warnings.simplefilter("ignore")
            self.optimizer, self.scaler, self.lr, self.weight_decay = modules.utils.init_opt(
                is_anneal=False,
                encoder=self.networks["encoder"],
                predictor=self.networks["predictor"],
                iterations_per_epoch=opt.ipe,
                start_lr=opt.start_lr,
                ref_lr=opt.lr,
                warmup=opt.warmup,
                num_epochs=opt.epochs,
                wd=opt.weight_decay,
                final_wd=opt.final_weight_decay,
                final_lr=opt.final_lr,
                mixed_precision=self.mixed_precision,
                ipe_scale=opt.ipe_scale,
                betas=opt.betas,
                eps=opt.eps,
            )
        self.momentum, self.exponent = opt.ema[0], cfg.loss.loss_exp
        self.clips = [normalise(clip, torch.float32).contiguous() for clip in ours.clips]
        self.masks = [masks.to_meta() for masks in ours.masks]
        self.cudnn_attention = cudnn_attention

    def _networks(self, modules: types.SimpleNamespace, ours: OurStep) -> nn.ModuleDict:
        with ours.clips[0].device:
            networks = build_networks(modules, ours.workload.config)
        for part in _PARTS:
            backbone: Any = networks[part].backbone
            missing, unexpected = backbone.load_state_dict(getattr(ours.model, part).state_dict(), strict=False)
            assert not unexpected and all(key.endswith("pos_embed") for key in missing), (missing, unexpected)
        return networks

    def __call__(self, step: int) -> float:
        """The loss."""
        return float(self.train(step))

    def train(self, step: int) -> Tensor:
        """One step; the loss, on the device."""
        with contextlib.ExitStack() as settings:
            torch.backends.cuda.enable_cudnn_sdp(self.cudnn_attention)
            if not self.cudnn_attention:
                # Its modules allow every kind of attention again at each call.
                settings.enter_context(mock.patch.object(torch.backends.cuda, "sdp_kernel", contextlib.nullcontext))
            settings.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)
            return self._train(step % len(self.masks))

    def _train(self, index: int) -> Tensor:
        encoder, predictor, target_encoder = (self.networks[part] for part in _PARTS)
        clips = [self.clips[index]]
        masks_enc, masks_pred = ([masks] for masks in self.masks[index])
        self.lr.step()
        self.weight_decay.step()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision):
            with torch.no_grad():
                targets = [F.layer_norm(h, (h.size(-1),)) for h in target_encoder(clips)]
            predictions = predictor(encoder(clips, masks_enc), masks_enc, masks_pred)
            wanted = [self.apply_masks(h, m, concat=False) for h, m in zip(targets, masks_pred, strict=True)]
            terms = [
                torch.mean(torch.abs(z - h) ** self.exponent) / self.exponent
                for group, chosen in zip(predictions, wanted, strict=True)
                for z, h in zip(group, chosen, strict=True)
            ]
            loss = sum(terms[1:], terms[0]) / len(terms)
        if self.scaler is not None:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            old: list[Tensor] = list(target_encoder.parameters())
            new: list[Tensor] = list(encoder.parameters())
            torch._foreach_mul_(old, self.momentum)
            torch._foreach_add_(old, new, alpha=1 - self.momentum)
        return loss.detach()
