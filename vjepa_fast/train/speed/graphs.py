"""Replays the whole training step as CUDA graphs: forward, backward, AdamW and EMA in one call a step.

A graph has fixed shapes and addresses, so each batch is copied into static buffers of a *bucket*, a fixed room for
context and target tokens, and the rows behind its tokens belong to nobody. A few buckets are chosen from the sizes
that masks have; each is captured once, after two steps that ran the same function on the same buffers, and all share
one pool of memory. What differs from step to step lies on the device: clips, token ids, where sequences begin, loss
weights, and the values of the optimizer's groups. Where a graph cannot serve, the step runs as it does without graphs.

Captured is the update only (TrainStep.update). Schedules are set on the host before it, random numbers come from
torch's default generator, whose seed and offset a replay takes as they are then, and whether a step is skipped was
always decided on the device.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import DynamicMasks, Sizes
from vjepa_fast.models.jepa import JEPAOutput
from vjepa_fast.models.layers import Block
from vjepa_fast.ops.attention.choice import Case, refusal_of
from vjepa_fast.ops.triton_support.dispatch import use_triton
from vjepa_fast.optim.adamw_ema import AdamWEMA
from vjepa_fast.optim.dtensors import place_of
from vjepa_fast.train.speed.buckets import choose_buckets
from vjepa_fast.train.step import StepResult, TrainStep

T = TypeVar("T", Tensor, MaskBatch)

WARM_UP = 2
"""Steps that run a bucket's function before it is captured, which compile and choose kernels and make the moments."""

NUM_BUCKETS = 4
MAX_BUCKETS = 8
"""With those that are added for batches that fit none."""

NUM_MISSES = 16
"""Batches that fit no bucket, after which one is added that holds them."""

UNIT = 128
"""Room is rounded up to so many tokens, a tile of a matrix product."""


def refusal(train_step: TrainStep, num_groups: int = 1) -> str | None:
    """Why no graph can serve the steps of a run, as the end of a sentence; None: one can.

    Args:
        train_step: as it will be called.
        num_groups: frames-per-clip groups of the run.
    """
    model = train_step.model
    device = next(model.parameters()).device
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, and the model is on the {device.type}"
    if num_groups > 1:
        return f"the clips are of {num_groups} lengths, and graphs serve one"
    found = _hindrance(train_step)
    if found is not None:
        return found
    if not use_triton(next(model.parameters())):
        return "the optimizer's kernels are not used (Triton is missing, VJEPA_FAST_OPS=ref, or weights in float64)"
    deterministic = torch.are_deterministic_algorithms_enabled()
    for network, width in ((model.encoder, model.encoder.embed_dim), (model.predictor, model.cfg.pred_embed_dim)):
        case = Case(device, network.dtype, width // network.num_heads, network.num_heads, True, deterministic, True)
        found = refusal_of(case, model.cfg.attention)
        if found is not None:
            return found
    return None


def _hindrance(train_step: TrainStep) -> str | None:
    """What is wrong with a step apart from where it runs; looked for again before each capture."""
    optimizer, model = train_step.optimizer, train_step.model
    if isinstance(train_step.forward, DistributedDataParallel):
        return "gradients are averaged over several processes, which is not captured"
    if train_step.num_micro > 1:
        return "optimization.grad_accumulation cuts batches up by lengths that the host must know"
    if train_step.scaler is not None:
        return "float16 has a loss scale that the host looks after; bfloat16 has none"
    if type(optimizer) is not AdamWEMA:
        return f"the optimizer is {type(optimizer).__name__}, and only AdamWEMA takes its values from the device"
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return "parameters are sharded, and the exchange between processes is not captured"
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if model.cfg.checkpointing != "none" and any(block.drop_path_rate > 0 for block in blocks):
        return "drop path in recomputed blocks needs the state of a generator, which a graph cannot read"
    return _hooked(model, optimizer)


_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _hooked(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    why = "a hook, which a replay would not call"
    if nn.modules.module._has_any_global_hook():
        return f"all modules have {why}"
    for name, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in _MODULE_HOOKS):
            return f"{name or 'the model'} has {why}"
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"{name} has {why}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"the optimizer has {why}"
    return None


@dataclass
class _Bucket:
    room: Sizes
    masks: DynamicMasks
    num_runs: int = 0
    """Since parameters have been where they are."""
    replay: Callable[[], None] | None = None
    figures: Tensor | None = None
    """[5]: loss, norm of the gradients, whether the step was skipped, norms of both networks' gradients; written by
    each run and replay."""
    output: JEPAOutput | None = None
    """Output of the captured step; a replay refills its tensors."""


class GraphedStep:
    """Callable in place of a TrainStep; the same arguments and results, except that `output` of a result lies in
    memory that the next step overwrites.

    Hooks, and parameters that are frozen or freed, are noticed when a bucket is captured, not at each replay. Writing
    to parameters, giving them other memory and loading optimizer state are noticed at each call.

    Args:
        train_step: what to capture; `refusal` says whether it can be.
        expected: sizes of typical batches, from which buckets are chosen; without them from those of the first
            NUM_MISSES batches, which run eagerly.
        say: told in a sentence where graphs give up.
    """

    def __init__(
        self, train_step: TrainStep, expected: Sequence[Sizes] = (), say: Callable[[str], object] = warnings.warn
    ) -> None:
        self.train_step = train_step
        self.optimizer = train_step.optimizer
        self.say = say
        self.buckets: list[_Bucket] = []
        self.num_eager = self.num_replayed = 0
        """Steps that fitted no bucket or came after graphs had given up; steps that were replays."""
        self._rooms = self._choose(expected, NUM_BUCKETS) if expected else []
        self._misses: list[Sizes] = []
        self._said: set[str] = set()
        self._stopped = False
        self._clips: Tensor | None = None
        self._kind: tuple[object, ...] = ()
        self._parameters = list(train_step.model.parameters())
        self._places: list[object] | None = None
        self._versions: list[int] = []
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(
        self, step: int, clips: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]
    ) -> StepResult:
        """Train on one batch; see TrainStep."""
        self._look_at_parameters()
        one_clips, one_masks = _only(clips), _only(masks)
        bucket = None
        if one_clips is None or one_masks is None:
            self._say_once("a batch with clips of several lengths runs without a CUDA graph")
        elif not self._stopped:
            bucket = self._bucket_of(one_clips, one_masks)
        if bucket is None:
            return self._eagerly(step, clips, masks)
        assert one_clips is not None and one_masks is not None and self._clips is not None
        scheduled = self.train_step.set_schedules(step)
        self.optimizer.write_group_values()
        self._clips.copy_(one_clips)
        bucket.masks.fill(one_masks)
        if bucket.replay is None and bucket.num_runs >= WARM_UP:
            self._capture(bucket)
        if self._stopped:
            return self._eagerly(step, clips, masks)
        if bucket.replay is not None:
            bucket.replay()
            self.num_replayed += 1
        else:
            self._aside(lambda: self._run(bucket))
            bucket.num_runs += 1
            self._note_parameters()
        return self._result(bucket, one_masks, scheduled)

    @property
    def stopped(self) -> bool:
        """Whether graphs have given up for good, which `say` was told."""
        return self._stopped

    def _eagerly(
        self, step: int, clips: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]
    ) -> StepResult:
        result = self.train_step(step, clips, masks)
        self.num_eager += 1
        self._note_parameters()
        return result

    def _run(self, bucket: _Bucket) -> None:
        """What is captured. It may depend on nothing that differs between two steps of a bucket but static buffers."""
        assert self._clips is not None
        # Last step's goes first, and a copy of the masks has nothing worked out yet.
        bucket.output = bucket.figures = None
        loss, output = self.train_step.update(self._clips, replace(bucket.masks))
        grad_norm, part_norms, skipped = self.optimizer.grad_norm, self.optimizer.part_norms, self.optimizer.skipped
        assert grad_norm is not None and part_norms is not None and skipped is not None
        bucket.figures = torch.cat([torch.stack([loss, grad_norm, skipped]), part_norms])
        bucket.output = output

    def _result(self, bucket: _Bucket, masks: MaskBatch, scheduled: tuple[float, float, float]) -> StepResult:
        assert bucket.figures is not None and bucket.output is not None
        # A caller may keep these for many steps.
        figures = bucket.figures.clone()
        loss, grad_norm, skipped = figures[:3].unbind()
        self.optimizer.grad_norm, self.optimizer.part_norms, self.optimizer.skipped = grad_norm, figures[3:], skipped
        total = sum(masks.target_lengths)
        output = replace(
            bucket.output,
            packed_predictions=bucket.output.packed_predictions[:total],
            target_rows=bucket.output.target_rows[:total],
            masks=[masks],
            context=bucket.output.context[: sum(masks.context_lengths)],
        )
        return StepResult(loss, grad_norm, figures[3:], skipped, *scheduled, output)

    def _aside(self, run: Callable[[], None]) -> None:
        """Run on the stream of the captures, whose libraries then have their workspaces."""
        stream = self._stream()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """The captured function; nothing is computed yet."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        # A collection in the middle of a capture could free another graph, which ends the capture.
        gc.collect()
        gc.disable()
        try:
            # Pinned memory for the tables of the multi-tensor kernels is allocated within, and the loader's thread may
            # do so meanwhile; the stricter modes forbid both. Waiting for the stream is an error in this one too.
            # The outer context puts the stream back, which a capture that fails to end does not.
            stream = self._stream()
            with (
                torch.cuda.stream(torch.cuda.current_stream(stream.device)),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="relaxed"),
            ):
                run()
        finally:
            if collecting:
                gc.enable()
        return graph.replay

    def _stream(self) -> torch.cuda.Stream:
        if self._side is None:
            assert self._clips is not None
            self._side = torch.cuda.Stream(self._clips.device)
        return self._side

    def _capture(self, bucket: _Bucket) -> None:
        why = _hindrance(self.train_step)
        if why is None:
            try:
                bucket.replay = self._record(lambda: self._run(bucket))
            except RuntimeError as error:
                why = f"a capture failed: {_first_cause(error)}"
                self.optimizer.zero_grad(set_to_none=True)
            self._note_parameters()
        if why is not None:
            self._stopped = True
            self.buckets.clear()
            self._say_once(f"steps run without CUDA graphs from here on: {why}")

    def _look_at_parameters(self) -> None:
        """Graphs that know parameters or moments at other places are of no use any more; new values must reach the
        half-precision copies that they multiply with."""
        if self._places is None:
            return
        if not _same(self._places, self._places_now()):
            for bucket in self.buckets:
                bucket.replay, bucket.num_runs = None, 0
                bucket.output = bucket.figures = None
            # A pool whose last graph is gone takes no other.
            self._pool = None
        elif self._versions != [p._version for p in self._parameters]:
            self.optimizer.write_shadows()
        else:
            return
        self._note_parameters()

    def _note_parameters(self) -> None:
        self._places, self._versions = self._places_now(), [p._version for p in self._parameters]

    def _places_now(self) -> list[object]:
        return [self.optimizer.layout, *map(place_of, self._parameters)]

    def _bucket_of(self, clips: Tensor, masks: MaskBatch) -> _Bucket | None:
        """The cheapest bucket that holds the batch."""
        kind = (clips.shape, clips.dtype, clips.device, masks.grid, masks.num_masks, masks.mask_token)
        if self._clips is None:
            self._clips, self._kind = torch.empty_like(clips, memory_format=torch.contiguous_format), kind
        if kind != self._kind:
            self._say_once("a batch of another shape than the first runs without a CUDA graph")
            return None
        self._make_buckets(masks)
        sizes = Sizes.of(masks)
        fitting = [bucket for bucket in self.buckets if sizes.fits(bucket.room)]
        if fitting:
            return min(fitting, key=lambda bucket: self._context_cost() * bucket.room.context + bucket.room.target)
        self._misses.append(sizes)
        if len(self._misses) >= NUM_MISSES and len(self.buckets) < MAX_BUCKETS:
            self._rooms = self._choose(self._misses, 1 if self.buckets else NUM_BUCKETS)
            self._misses.clear()
        return None

    def _make_buckets(self, masks: MaskBatch) -> None:
        self.buckets += [_Bucket(room, DynamicMasks.like(masks, room)) for room in self._rooms]
        self._rooms = []

    def _choose(self, sizes: Sequence[Sizes], count: int) -> list[Sizes]:
        return choose_buckets(sizes, count, self._context_cost(), UNIT)

    def _context_cost(self) -> float:
        """Of a context token, which goes through encoder and predictor, in target tokens, which go through the latter:
        the matrix products of a token are its parameters."""
        encoder, predictor = (
            sum(p.numel() for p in network.parameters())
            for network in (self.train_step.model.encoder.blocks, self.train_step.model.predictor.predictor_blocks)
        )
        return (encoder + predictor) / predictor

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(sentence)


def _first_cause(error: BaseException) -> str:
    """Its first line; ending a capture that something broke raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).split("\n", 1)[0]


def _only(groups: T | Sequence[T]) -> T | None:
    """The only entry of a list of groups; None where there are more."""
    if not isinstance(groups, Sequence):
        return groups
    return groups[0] if len(groups) == 1 else None


def _same(before: list[object], now: list[object]) -> bool:
    """The first by identity: another object is another layout, whatever it holds."""
    return before[0] is now[0] and before[1:] == now[1:]
