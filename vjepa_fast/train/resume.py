"""What changed between the run that wrote a checkpoint and the one that continues it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_HARMLESS = frozenset({
    "train.out", "train.name", "train.device", "train.max_steps", "train.log_every", "train.checkpoint_every",
    "train.save_every_freq", "train.auto_resume", "train.read_checkpoint", "train.tensorboard", "train.probe",
    "train.connect_timeout", "train.keep_last", "train.async_checkpoint", "train.watchdog", "train.shard_optimizer",
    "train.rollback_after", "train.max_rollbacks", "train.spike_factor",
    "data.num_workers", "data.prefetch", "data.pin_mem", "data.cache_dir", "data.max_broken",
    "data.device_prefetch", "data.dali_threads", "img_data.num_workers",
    # How the clips of a step are spread over processes; their number is compared by the trainer.
    "data.batch_size", "data.global_batch_size",
    # `auto` may mean another decoder than before: what it stands for is compared by the trainer.
    "data.backend",
    "model.use_activation_checkpointing", "model.activation_checkpointing", "model.compile_model", "model.attention",
    "train.cuda_graphs",
    "optimization.grad_accumulation",
    # Copies of keys of other sections.
    "data.seed", "model.crop_size", "model.num_frames", "model.patch_size", "model.tubelet_size", "model.dtype",
})
"""Keys that do not change what is learned, or only as much as rounding does."""


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key old -> new` for every key that changes what is learned; keys that one side lacks are not compared.

    Args:
        old, new: configs as `Config.model_dump(mode="json")` gives them.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key} {before[key]} -> {after[key]}"
        for key in before
        if key in after and key not in _HARMLESS and before[key] != after[key]
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield f"{prefix} (how many)", len(value)
        for index, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value
