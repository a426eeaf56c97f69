"""Whole training steps of ours and of the reference, run in turns on the same weights, clips and masks.

The reference's step is its own modules, optimizer factory and schedules in the order of its training loop
(facebookresearch/vjepa2, app/vjepa/train.py:424-487), in one process without its DDP wrappers. Its clips are
normalised beforehand, as its data workers do; ours arrive as uint8 and are normalised in the step. Masks of both are
drawn beforehand.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronize
from benchmarks.workload import Workload, fresh
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.vit import size_of
from vjepa_fast.train.step import TrainStep


class Step(Protocol):
    """One side of a comparison: call it with the number of the step."""

    def __call__(self, step: int) -> Any: ...


class OurStep:
    """vjepa_fast's step, over batches that take turns.

    Args:
        workload: what to train.
        device: where.
        num_batches: different batches, each with its own clips and masks.
        cudnn_attention: allow cuDNN's attention, which torch may prefer on a GPU and which plans anew for each shape.
        seed: of the weights.
    """

    def __init__(
        self, workload: Workload, device: torch.device, num_batches: int, *, cudnn_attention: bool = True, seed: int = 0
    ) -> None:
        self.model = workload.model(device, seed)
        self.train_step = TrainStep(self.model, workload.config)
        self.clips = [workload.clips(device, index) for index in range(num_batches)]
        self.masks = [workload.masks(device, index) for index in range(num_batches)]
        self.cudnn_attention = cudnn_attention

    def __call__(self, step: int) -> torch.Tensor:
        """The loss, on the device."""
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn_attention)
        index = step % len(self.masks)
        return self.train_step(step, self.clips[index], fresh(self.masks[index])).loss


class ReferenceStep:
    """The reference's step on the batches and from the weights of one of ours.

    Args:
        workload: what to train.
        ours: where weights, clips and masks are taken from, before its first step.
        checkpointing: recompute activations, as all of the reference's configs do.
        cudnn_attention: as in OurStep.
        compiled: torch.compile of every block. Its own compile_model compiles whole networks, which takes minutes and
            starts again with every few new token counts; the blocks hold nearly all of the work and share one result.
    """

    def __init__(
        self, workload: Workload, ours: OurStep, *, checkpointing: bool, cudnn_attention: bool = True,
        compiled: bool = False,
    ) -> None:
        from tests.parity import meta_reference
        from tests.parity.cases import Case
        from tests.parity.ours import weights_of

        cfg = workload.config
        size, model, opt = size_of(cfg.model), cfg.model, cfg.optimization
        assert model.pred_num_heads is not None and model.patch_size is not None and model.tubelet_size is not None
        case = Case(
            workload.name, frames=(workload.num_frames,), uniform_power=model.uniform_power,
            batch_size=workload.batch_size, crop_size=workload.crop_size, patch_size=model.patch_size,
            tubelet_size=model.tubelet_size, embed_dim=size.embed_dim, depth=size.depth, num_heads=size.num_heads,
            pred_embed_dim=model.pred_embed_dim, pred_depth=model.pred_depth, pred_num_heads=model.pred_num_heads,
            num_masks=len(cfg.mask.masks))
        device = ours.clips[0].device
        with device:
            self.triple = meta_reference.build(case)
        self.triple.load(weights_of(ours.model))
        for _, module in self.triple.parts():
            backbone: Any = module.backbone
            backbone.use_activation_checkpointing = checkpointing
            for block in (backbone.predictor_blocks if hasattr(backbone, "predictor_blocks") else backbone.blocks):
                if compiled:
                    block.compile()
        self.apply_masks = meta_reference.modules().mask_utils.apply_masks
        self.dtype, self.device = workload.torch_dtype, device
        self.mixed_precision = self.dtype != torch.float32
        with warnings.catch_warnings():
            # Its GradScaler is the one that torch has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            self.optimizer, self.scaler, self.lr, self.weight_decay = meta_reference.modules().utils.init_opt(
                is_anneal=False, encoder=self.triple.encoder, predictor=self.triple.predictor,
                iterations_per_epoch=opt.ipe, start_lr=opt.start_lr, ref_lr=opt.lr, warmup=opt.warmup,
                num_epochs=opt.epochs, wd=opt.weight_decay, final_wd=opt.final_weight_decay, final_lr=opt.final_lr,
                mixed_precision=self.mixed_precision, ipe_scale=opt.ipe_scale, betas=opt.betas, eps=opt.eps)
        self.momentum, self.exponent = opt.ema[0], cfg.loss.loss_exp
        self.clips = [meta_reference.normalise(clip, torch.float32).contiguous() for clip in ours.clips]
        self.masks = [masks.to_meta() for masks in ours.masks]
        self.cudnn_attention = cudnn_attention

    def __call__(self, step: int) -> float:
        """The loss."""
        with contextlib.ExitStack() as settings:
            torch.backends.cuda.enable_cudnn_sdp(self.cudnn_attention)
            if not self.cudnn_attention:
                # Its modules allow every kind of attention again at each call.
                settings.enter_context(mock.patch.object(torch.backends.cuda, "sdp_kernel", contextlib.nullcontext))
            settings.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)
            return self._train(step % len(self.masks))

    def _train(self, index: int) -> float:
        triple, clips = self.triple, [self.clips[index]]
        masks_enc, masks_pred = ([masks] for masks in self.masks[index])
        self.lr.step()
        self.weight_decay.step()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision):
            with torch.no_grad():
                targets = [F.layer_norm(h, (h.size(-1),)) for h in triple.target_encoder(clips)]
            predictions = triple.predictor(triple.encoder(clips, masks_enc), masks_enc, masks_pred)
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
            old: list[torch.Tensor] = list(triple.target_encoder.parameters())
            new: list[torch.Tensor] = list(triple.encoder.parameters())
            torch._foreach_mul_(old, self.momentum)
            torch._foreach_add_(old, new, alpha=1 - self.momentum)
        return float(loss.detach())


def check_same_loss(losses: dict[str, float], tolerance: float) -> None:
    """Refuse to time steps that do not compute the same thing.

    Args:
        losses: of the first step of each side, from the same weights on the same batch.
        tolerance: relative.

    Raises:
        ArithmeticError: two losses differ by more.
    """
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= tolerance * abs(high):
        raise ArithmeticError(f"the losses of the first step differ by more than {tolerance:g}: {losses}; no time is "
                              "worth reporting")


def interleave(
    steps: dict[str, Step], device: torch.device, rounds: int, first_step: int = 0, budget_s: float = float("inf"),
    min_rounds: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turns: A B A B.

    Args:
        steps: the sides.
        device: synchronised around each step.
        rounds: steps of each side.
        first_step: number of the first one.
        budget_s: stop early after this time, but not before `min_rounds`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for number in range(first_step, first_step + rounds):
        for name, step in steps.items():
            synchronize(device)
            began = time.perf_counter()
            step(number)
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
        if time.perf_counter() - started > budget_s and number - first_step + 1 >= min_rounds:
            break
    return seconds


def masks_of_batches(masks: Sequence[MaskBatch]) -> dict[str, list[int]]:
    """Tokens of all sequences, batch by batch."""
    return {"context": [sum(m.context_lengths) for m in masks], "target": [sum(m.target_lengths) for m in masks]}


_MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def _kind(operator: str) -> str:
    if any(name in operator for name in ("scaled_dot_product", "flash_attention", "vjepa_fast::attention")):
        return "attention"
    if operator in _MATMUL or "conv" in operator:
        return "matmul"
    return "other"


def profile_steps(step: Callable[[int], Any], numbers: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Where the time of some steps goes.

    Returns:
        Milliseconds a step by kind: `matmul` (with the patch embedding's convolution), `attention`, `other`; and the
        operators with the largest self time.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as recorded:
        for number in numbers:
            step(number)
        synchronize(device)
    kinds = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
    operators: list[tuple[float, str, int]] = []
    for event in recorded.key_averages():
        # Kernels are listed once more by themselves; what launched them already has their time.
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        kinds[_kind(event.key)] += micros / 1e3 / len(numbers)
        operators.append((micros / 1e3 / len(numbers), event.key, event.count // len(numbers)))
    operators.sort(reverse=True)
    return {
        "ms_by_kind": kinds,
        "operators": [{"name": name, "ms": ms, "calls": calls} for ms, name, calls in operators[:25]],
        "num_operators": sum(calls for _, name, calls in operators if name.startswith("aten::")),
    }
