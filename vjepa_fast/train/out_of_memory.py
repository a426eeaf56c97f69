"""What helps when memory runs out, and by how much: predicted by vjepa_fast.cost."""

from __future__ import annotations

import torch

from vjepa_fast.config.schema import Config

_GIB = 2**30


def ran_out(error: BaseException) -> bool:
    """Whether an error says that an allocation, on a GPU or on the CPU, failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))


def explain(cfg: Config, batch_size: int, device: torch.device, step: int) -> str:
    """The message of a run that ran out of memory.

    Args:
        cfg: of the run.
        batch_size: clips of a step of one process.
        device: whose memory it was.
        step: in which step.
    """
    # Only needed here, and not small.
    from vjepa_fast.cost.memory import Memory, estimate_memory
    from vjepa_fast.cost.operations import Loads
    from vjepa_fast.cost.plan import draw_masks

    def predicted(clips: int) -> Memory:
        return estimate_memory(cfg, Loads.of(draw_masks(cfg, clips)))

    num_micro = cfg.optimization.grad_accumulation
    now = predicted(max(1, batch_size // num_micro))
    full = cfg.model.activation_checkpointing == "full"
    peak = now.peak_checkpointed if full else now.peak
    helps = []
    if not full:
        helps.append(("model.activation_checkpointing=full", now.peak_checkpointed))
    if batch_size >= 2 * num_micro:
        half = predicted(max(1, batch_size // (2 * num_micro)))
        bytes_of_half = half.peak_checkpointed if full else half.peak
        helps.append((f"optimization.grad_accumulation={2 * num_micro}, which changes no loss", bytes_of_half))
    if cfg.model.dtype == "float32":
        helps.append(("train.dtype=bfloat16, for half of the activations", now.states + (peak - now.states) / 2))
    total = ""
    if device.type == "cuda":
        total = f" ({torch.cuda.get_device_properties(device).total_memory / _GIB:.1f} GiB)"
    advice = "; ".join(f"{what}: {size / _GIB:.1f} GiB" for what, size in helps)
    return (f"memory of the {'GPU' if device.type == 'cuda' else 'machine'}{total} ran out in step {step}; predicted "
            f"for this config: {peak / _GIB:.1f} GiB a process. " +
            (f"With {advice}" if helps else "Use fewer clips a process or a smaller model"))
