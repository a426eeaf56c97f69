"""Chooses optional speed-ups, compiled blocks and CUDA graphs, on request or by measurement."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vjepa_fast.config.schema import Config
from vjepa_fast.distributed.processes import Processes
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.models.compiled_blocks import NotCompiled, require_compiler
from vjepa_fast.models.layers import set_compiled
from vjepa_fast.train.monitor.out_of_memory import is_out_of_memory
from vjepa_fast.train.speed.graphs import WARM_UP, GraphedStep, refusal
from vjepa_fast.train.speed.timing_trials import MARGIN, race, restoring_state, seconds_of
from vjepa_fast.train.step import TrainStep

StepCallable = TrainStep | GraphedStep

LONG_STEP = 0.5
"""Seconds: an eager step above this is not raced with graphs, as launches are a small part of it."""


@dataclass(frozen=True)
class Trial:
    """A step to measure with; all processes have as many."""

    step: int
    clips: Sequence[Tensor]
    masks: Sequence[MaskBatch]


class SpeedUps:
    """Settles `auto` and puts together what runs a step.

    Args:
        cfg: model.compile_model and train.cuda_graphs.
        train_step: at the state in which training begins or goes on.
        processes: which have to agree.
        say: told what was chosen, a sentence each.
    """

    def __init__(self, cfg: Config, train_step: TrainStep, processes: Processes, say: Callable[[str], object]) -> None:
        self.cfg, self.train_step, self.processes, self.say = cfg, train_step, processes, say
        self.device = next(train_step.model.parameters()).device

    @property
    def measures(self) -> bool:
        """Whether anything is to be measured."""
        races_graphs = self.cfg.train.cuda_graphs == "auto" and self.graphs_can_serve
        return races_graphs or self.cfg.model.compile_model == "auto"

    @property
    def graphs_can_serve(self) -> bool:
        """Whether CUDA graphs are wanted, or to be tried, and nothing speaks against them."""
        return self.cfg.train.cuda_graphs is not False and refusal(self.train_step) is None

    def choose(
        self, trials: Sequence[Trial], expected: Sequence[Sizes], num_groups: int, profiled: bool
    ) -> StepCallable:
        """What runs the steps.

        Args:
            trials: batches to measure with, at least one where `measures`.
            expected: see GraphedStep.
            num_groups: frames-per-clip groups of the run.
            profiled: whether a profiler will look at single operators, of which a replay has none.
        """
        if self.cfg.model.compile_model == "auto":
            self._choose_compiled(trials)
        wanted = self.cfg.train.cuda_graphs
        if wanted is False:
            return self.train_step
        why = refusal(self.train_step, num_groups)
        if why is None and profiled:
            why = "a profile shows single operators, and a replay has none"
        if why is not None:
            # `auto` is the default, and nobody has asked.
            if wanted is True:
                self.say(f"train.cuda_graphs=true: steps run without CUDA graphs: {why}")
        elif wanted is True or self._graphs_are_faster(trials, expected):
            return GraphedStep(self.train_step, expected, self.say)
        return self.train_step

    @staticmethod
    def _run(run: StepCallable, trial: Trial) -> None:
        run(trial.step, trial.clips, trial.masks)

    def _choose_compiled(self, trials: Sequence[Trial]) -> None:
        model = self.train_step.model

        def step(compiled: bool, number: int) -> None:
            set_compiled(model, compiled)
            self._run(self.train_step, trials[number % len(trials)])

        key, faster = "model.compile_model=auto", False
        try:
            with restoring_state(self.train_step):
                # What is wrong with it is not the compiler's fault.
                step(False, 0)
                self._look_for_compiler()
                # The second has other token counts: compiled code for any of them comes with it.
                step(True, 0)
                step(True, 1)
                faster = self._faster(
                    key, "compiled blocks", lambda number: step(True, number), lambda number: step(False, number)
                )
        except NotCompiled as error:
            self.say(f"{key}: blocks are not compiled: {error}")
        set_compiled(model, faster)

    def _look_for_compiler(self) -> None:
        """Raises NotCompiled in all processes where one of them has none, as they take the same steps."""
        why = "another process has no compiler"
        try:
            require_compiler(self.device)
            missing = False
        except NotCompiled as error:
            why, missing = str(error), True
        if self.processes.largest(missing):
            raise NotCompiled(why)

    def _graphs_are_faster(self, trials: Sequence[Trial], expected: Sequence[Sizes]) -> bool:
        faster = False
        try:
            with restoring_state(self.train_step):
                faster = self._race_graphs(trials, expected)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.say("train.cuda_graphs=auto: CUDA graphs are not used, they do not fit in memory next to eager steps")
        # The trial graphs reference optimizer moments that were just restored; drop them.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return faster

    def _race_graphs(self, trials: Sequence[Trial], expected: Sequence[Sizes]) -> bool:
        for trial in trials:
            self._run(self.train_step, trial)
        took = seconds_of(lambda: self._run(self.train_step, trials[0]), self.device)
        if took > LONG_STEP:
            self.say(
                f"train.cuda_graphs=auto: CUDA graphs are not tried: a step of {1e3 * took:.4g} ms hardly waits "
                "for launches"
            )
            return False
        # The buckets of the run, with its padding and its memory.
        sizes = expected or [Sizes.of(trial.masks[0]) for trial in trials]
        graphed = GraphedStep(self.train_step, sizes, self.say)
        for _ in range(WARM_UP + 1):
            for trial in trials:
                self._run(graphed, trial)
        faster = self._faster(
            "train.cuda_graphs=auto",
            "CUDA graphs",
            lambda number: self._run(graphed, trials[number % len(trials)]),
            lambda number: self._run(self.train_step, trials[number % len(trials)]),
        )
        return faster and not graphed.stopped

    def _faster(self, key: str, what: str, with_it: Callable[[int], None], without: Callable[[int], None]) -> bool:
        """Whether a speed-up is one, in the sum over all processes, which therefore agree."""
        seconds = race({"with": with_it, "without": without}, self.device, 10 if self.device.type == "cuda" else 3)
        times = torch.tensor([seconds["with"], seconds["without"]], dtype=torch.float64)
        ours, plain = (self.processes.sum_on_host(times) / self.processes.world_size).tolist()
        faster = ours * MARGIN < plain
        self.say(
            f"{key}: {what} {'are' if faster else 'are not'} used, {1e3 * ours:.4g} ms a step with and "
            f"{1e3 * plain:.4g} ms without"
        )
        return faster
