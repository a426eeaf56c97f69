"""Explains an out-of-memory error and predicts which settings would help."""

from __future__ import annotations

import torch

from vjepa_fast.config.schema import Config

_GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation, on a GPU or on the CPU, failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def explain(cfg: Config, batch_size: int, device: torch.device, step: int, num_processes: int = 1) -> str:
    """The message of a run that ran out of memory.

    Args:
        cfg: of the run.
        batch_size: clips of a step of one process.
        device: whose memory it was.
        step: in which step.
        num_processes: of the run.
    """
    # Only needed here, and not small.
    from vjepa_fast.cost.advice import Adviser
    from vjepa_fast.cost.plan import draw_masks

    on_gpu = device.type == "cuda"
    adviser = Adviser(cfg, draw_masks(cfg, batch_size), num_processes, kernels=on_gpu)
    total = f" ({torch.cuda.get_device_properties(device).total_memory / _GIB:.1f} GiB)" if on_gpu else ""
    advice = "; ".join(map(str, adviser.single()))
    graphs = on_gpu and cfg.train.cuda_graphs is not False
    return (
        f"memory of the {'GPU' if on_gpu else 'machine'}{total} ran out in step {step}; predicted for this config: "
        f"{adviser.peak(cfg) / _GIB:.1f} GiB a process. "
        + (f"With {advice}" if advice else "Use fewer clips a process or a smaller model")
        + ("; CUDA graphs, which train.cuda_graphs=false leaves out, need more memory" if graphs else "")
    )
