"""Predicts the memory of a training step: what is always resident, and one step, allocation by allocation.

The step is walked through as training does it, one block of a network after the other: what is kept for the backward
comes in during the forward and goes again block by block, while gradients come in. The peak is where the sum is
highest, in one of the networks' forwards, or at some block of the backward; so gradients and activations do not simply
add up. What a block takes, by our operators' and PyTorch's files, stands in vjepa_fast.cost.activations.

Bytes an element of what lies there all the time: parameters 4, moments 8, the target encoder 4, copies in half
precision 2 each. Gradients, 4, are there from the backward to the update, and all the time as buckets of data
parallelism or after the first of several micro-batches. With train.shard_optimizer a process has its share of the
moments only, and of the gradients, of which a block's are whole at a time; with train.parallel=fsdp its share of
everything, and two blocks' weights are whole at a time.

What the CUDA context (0.3 to 0.5 GiB), the allocator's rounding and fragments, the pools of DALI, and CUDA graphs take
is not in it. Measured: benchmarks/plan_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vjepa_fast.config.schema import Config
from vjepa_fast.cost.activations import Stack, Tokens, stack_of
from vjepa_fast.cost.loads import Loads, image_groups, networks_of, pixel_values
from vjepa_fast.cost.parameters import Parameters, count_parameters
from vjepa_fast.masking.batch import MaskBatch

AHEAD = 4
"""data.device_prefetch with DALI on a GPU."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    parameters: float
    """fp32, of all three networks."""
    gradients: float
    """fp32; whether they are there at the peak is another question."""
    optimizer_state: float
    shadows: float
    peak: float
    """All of it, where it is most."""
    where: str
    """In which part of a step that is."""

    @property
    def permanent(self) -> float:
        """What lies there between two steps."""
        return self.parameters + self.optimizer_state + self.shadows

    @property
    def activations(self) -> float:
        """What the peak adds: activations, gradients as far as they are there, clips."""
        return self.peak - self.permanent


class _Account:
    """Bytes that are there now, and the most there ever were."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.most, self.where = now, "between steps"

    def add(self, size: float) -> None:
        self.now += size

    def spike(self, size: float, where: str) -> None:
        """Something that comes and goes."""
        if self.now + size > self.most:
            self.most, self.where = self.now + size, where


@dataclass(frozen=True)
class _Step:
    """What the account of a step is drawn up from."""

    encoder: Stack
    predictor: Stack
    whole: Tokens
    context: Tokens
    both: Tokens
    predicted: float
    """Rows of what is predicted."""
    clips: float
    """Bytes of a micro-batch's clips."""
    output: float
    """Features and predictions of a micro-batch, which its result holds."""
    loss: tuple[float, float]
    """Kept for the backward, and passing."""
    embed: float
    """Kept by what embeds the context for the predictor."""


def peak_memory(
    cfg: Config, steps: Sequence[Sequence[MaskBatch]], *, num_processes: int = 1, kernels: bool = True
) -> Memory:
    """Of the largest of these steps, for masks differ in length from step to step.

    Args:
        cfg, num_processes, kernels: as estimate_memory.
        steps: masks of some steps, each a list of one MaskBatch a frames-per-clip group.
    """
    images, found = image_groups(cfg), count_parameters(cfg.model)
    some = (_estimate(cfg, Loads.of([step], images), found, num_processes, kernels) for step in steps)
    return max(some, key=lambda memory: memory.peak)


def estimate_memory(cfg: Config, loads: Loads, *, num_processes: int = 1, kernels: bool = True) -> Memory:
    """Of one process in one step.

    Args:
        cfg: of the run.
        loads: tokens of a step of one process, all its micro-batches together.
        num_processes: how many average their gradients.
        kernels: on a GPU with our kernels; False: on a CPU.
    """
    return _estimate(cfg, loads, count_parameters(cfg.model), num_processes, kernels)


def _estimate(cfg: Config, loads: Loads, found: Parameters, num_processes: int, kernels: bool) -> Memory:
    s, num_micro = element_size(cfg), cfg.optimization.grad_accumulation
    shadows = float((found.linear + found.target_linear) * s) if s < 4 else 0.0
    of_all = num_processes if cfg.train.parallel == "fsdp" else 1
    shares = num_processes if cfg.train.shard_optimizer else of_all
    # Of several micro-batches they are added up whole, but for those of FSDP2.
    gradients = 4.0 * found.trained / (shares if num_micro == 1 else of_all)
    base = Memory(
        4.0 * (found.trained + found.target) / of_all,
        gradients,
        8.0 * found.trained / shares,
        0.0 if of_all > 1 else shadows,
        0.0,
        "",
    )
    step = _step_of(cfg, loads.divided(num_micro), kernels)
    # The batches that the loader has ahead on a GPU, and this one.
    ahead = (cfg.data.device_prefetch or AHEAD) if kernels else 0
    account = _Account(base.permanent + step.clips * num_micro * (1 + ahead))
    # Of the step before, until this one has ended.
    account.add(step.output)
    if of_all > 1:
        # The block that runs and the next one, and of the former a copy in half precision.
        largest = max(found.encoder / step.encoder.depth, found.predictor / step.predictor.depth)
        account.add(largest * (2 * 4 + (s if s < 4 else 0)))
    buckets = num_processes > 1 and shares == 1
    if buckets:
        account.add(gradients)
    for micro in range(min(num_micro, 2)):
        # Beyond their place, if there is one, the gradients of a block for a moment.
        _walk(account, step, found, 0.0 if buckets or micro else gradients / found.trained, whole=shares > 1)
        # The result of a micro-batch is there until that of the next one takes its place.
        if micro == 0:
            account.add(step.output)
    return replace(base, peak=account.most, where=account.where)


def element_size(cfg: Config) -> int:
    """Bytes of an element of the compute dtype."""
    return 4 if cfg.model.dtype == "float32" else 2


def clip_bytes(cfg: Config, loads: Loads) -> float:
    """uint8 pixels of all clips."""
    of_video, of_image = pixel_values(cfg)
    return of_video * (loads.whole.tokens - loads.image_tokens) + of_image * loads.image_tokens


def _step_of(cfg: Config, loads: Loads, kernels: bool) -> _Step:
    encoder, predictor = networks_of(cfg)
    model, s = cfg.model, element_size(cfg)
    levels = model.n_output_distillation or 1
    wide = levels * encoder.width
    predicted = loads.both.tokens if model.return_all_tokens else loads.target.tokens
    clips = clip_bytes(cfg, loads)
    features, predictions = loads.whole.tokens * wide * s, predicted * wide * s
    slope = 1 if cfg.loss.loss_exp == 1 else 4
    if kernels:
        loss = predicted * wide * slope, predicted * wide * s
    else:
        # Differences, and their absolute values where these are raised to a power; the targets in fp32, twice.
        loss = 4.0 * predicted * wide * (1 if slope == 1 else 2), 3 * 4.0 * predicted * wide
    embed = loads.context.tokens * s * (wide + (2 * encoder.width if levels > 1 else 0))
    pixels = clips / max(loads.whole.tokens, 1)
    kept = model.checkpointing
    return _Step(
        stack_of(encoder, s, kernels, kept, levels=levels, pixels=pixels, float8=model.target_precision == "float8"),
        stack_of(predictor, s, kernels, kept),
        Tokens(loads.whole.tokens),
        Tokens(loads.context.tokens),
        Tokens(loads.both.tokens, None if model.return_all_tokens else predicted),
        predicted,
        clips,
        features + predictions,
        loss,
        embed,
    )


def _walk(account: _Account, step: _Step, found: Parameters, grad: float, whole: bool) -> None:
    """A micro-batch; what it leaves behind, its gradients, stays in the account.

    Args:
        account: as it is before.
        step: what there is to account for.
        found: numbers of parameters.
        grad: bytes that the gradient of a parameter adds.
        whole: a block's gradients are there beside what they add.
    """
    encoder, predictor, begin, s = step.encoder, step.predictor, account.now, step.encoder.element
    tokens_of_clips = step.whole.all
    account.spike(encoder.passing(tokens_of_clips), "target encoder")
    account.spike(tokens_of_clips * encoder.patches, "target encoder")
    # All levels, and then side by side.
    features = tokens_of_clips * s * encoder.width * encoder.levels
    account.spike(
        features * (2 if encoder.levels > 1 else 1) + 2 * tokens_of_clips * s * encoder.width, "target encoder"
    )
    account.add(features)
    for name, stack, tokens in (("context encoder", encoder, step.context), ("predictor", predictor, step.both)):
        account.add(stack.kept_before(tokens.all))
        for index in range(stack.depth):
            account.spike(stack.forward(tokens.all), name)
            account.add(stack.stored(tokens, index))
        account.add(stack.kept_behind(tokens))
        if stack is encoder:
            account.add(step.embed)
    predictions = step.predicted * s * encoder.width * encoder.levels
    account.add(predictions + step.loss[0])
    account.spike(step.loss[1], "loss")
    account.add(-step.loss[0])
    account.spike(predictions + step.loss[0], "loss, backward")
    networks = (
        ("predictor, backward", predictor, step.both, found.predictor),
        ("context encoder, backward", encoder, step.context, found.encoder),
    )
    for name, stack, tokens, parameters in networks:
        account.add(-stack.kept_behind(tokens))
        share = parameters / stack.depth
        for index in reversed(range(stack.depth)):
            account.spike(stack.backward(tokens, index) + 4 * (share if whole else stack.widest_weight), name)
            account.add(grad * share - stack.stored(tokens, index))
        account.spike(stack.behind_backward(tokens), name)
        account.add(-stack.kept_before(tokens.all))
        if stack is predictor:
            account.add(-step.embed)
    account.now = begin + grad * (found.encoder + found.predictor)
    account.spike(features + predictions, "optimizer")
