"""GPU memory of a training step, estimated: states, and the activations at the peak.

States, bytes an element: parameters 4, gradients 4, two moments 8, the target encoder 4, shadows 2 each in half
precision. Activations of a block, with s bytes an element, D width and F hidden width: what its backward reads, that is
the inputs of both norms, of the four linear layers and of the activation, queries, keys, values, and the output of
attention, 8 D s + 2 F s a token (with SwiGLU 8 D s + 3 F s). With activation checkpointing only the input of each block
is kept, D s, and one block at a time is recomputed. The target encoder keeps nothing; it needs its widest layer.

What the allocator loses to fragments and the CUDA context are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vjepa_fast.config.schema import Config
from vjepa_fast.cost.operations import Load, Loads, Network, networks_of
from vjepa_fast.cost.parameters import count_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    parameters: float
    """fp32, of all three networks."""
    gradients: float
    optimizer_state: float
    shadows: float
    activations: float
    """At the peak, without activation checkpointing."""
    activations_checkpointed: float
    """At the peak, with it."""

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.optimizer_state + self.shadows

    @property
    def peak(self) -> float:
        return self.states + self.activations

    @property
    def peak_checkpointed(self) -> float:
        return self.states + self.activations_checkpointed


def kept_by_block(net: Network, load: Load, s: int) -> float:
    """Bytes that one block keeps for its backward."""
    statistics = 2 * 2 * 4 + 4 * net.num_heads
    return load.tokens * (s * (8 * net.width + (3 if net.swiglu else 2) * net.hidden) + statistics)


def estimate_memory(cfg: Config, loads: Loads) -> Memory:
    """Of one process.

    Args:
        cfg: of the run.
        loads: tokens of a step.
    """
    encoder, predictor = networks_of(cfg)
    s = 4 if cfg.model.dtype == "float32" else 2
    found = count_parameters(cfg.model)
    pixels = loads.whole.tokens / max(1.0, loads.clips) * 3 * (cfg.model.patch_size or 1) ** 2
    pixels *= cfg.model.tubelet_size if cfg.model.tubelet_size and (cfg.model.num_frames or 1) > 1 else 1
    # uint8 clips, features of the target encoder, predictions and their slopes live through the backward.
    wide = (cfg.model.n_output_distillation or 1) * encoder.width * s
    predicted = loads.both.tokens if cfg.model.return_all_tokens else loads.target.tokens
    fixed = loads.clips * pixels + loads.whole.tokens * wide + 2 * predicted * wide
    teacher = loads.whole.tokens * s * (3 * encoder.width + 2 * encoder.hidden)
    kept = recomputed = 0.0
    for net, load in ((encoder, loads.context), (predictor, loads.both)):
        block = kept_by_block(net, load, s)
        kept += net.depth * block
        recomputed += net.depth * load.tokens * net.width * s
    one_block = max(kept_by_block(encoder, loads.context, s), kept_by_block(predictor, loads.both, s))
    shadows = (found.linear + found.target_linear) * s if s < 4 else 0
    return Memory(
        4.0 * (found.trained + found.target), 4.0 * found.trained, 8.0 * found.trained, float(shadows),
        fixed + max(kept, teacher), fixed + max(recomputed + one_block, teacher))
