"""Sections `optimization` and `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vjepa_fast.config.sections.base import Dtype, NonNegative, PositiveFloat, PositiveInt, Range, Section, Switch


class OptimizationConfig(Section):
    """AdamW and its schedules. Epochs are units of `ipe` steps."""

    epochs: PositiveInt = 10
    ipe: PositiveInt | None = 300
    """Steps per epoch; None: as many as the data gives (the reference's default)."""
    ipe_scale: Annotated[float, Field(gt=0)] = 1.25
    """The schedules run over ipe_scale * epochs * ipe steps and are cut at the end of training."""
    schedule: Literal["warmup_cosine", "linear", "wsd"] = "warmup_cosine"
    warmup: NonNegative = 40
    """Epochs."""
    anneal: NonNegative = 0
    """Epochs of linear decay at the end of a `wsd` schedule."""
    start_lr: NonNegative = 1e-4
    lr: NonNegative = 5.25e-4
    final_lr: NonNegative = 5.25e-4
    weight_decay: NonNegative = 0.04
    final_weight_decay: NonNegative = 0.04
    ema: Range = (0.99925, 0.99925)
    """Momentum of the target encoder at the first and at the last step."""
    betas: Range = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    anneal_ckpt: Path | None = None
    """Start from these weights and this optimizer state at step 0 (cooldown)."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the encoder's gradients and of the predictor's, each by itself, from the second epoch after the
    warm-up on, as in V-JEPA 1; None: any."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches per step; the batch size is that of the whole step."""
    loss_reg_std_mult: Annotated[float, Field(gt=0)] | None = None
    """Skip a step whose loss exceeds mean + so many standard deviations of the last losses. None: skip none."""
    loss_reg_num_tracking_steps: PositiveInt = 300
    """How many last losses; half of them must be there before a step is skipped."""
    loss_reg_min_epoch: Annotated[int, Field(ge=0)] = 50
    """No step is skipped up to this epoch, counted from 0."""

    @model_validator(mode="after")
    def _check(self) -> OptimizationConfig:
        for value in self.ema:
            if not 0 <= value <= 1:
                raise ValueError(f"ema is {list(self.ema)}; expected two momenta in [0, 1]")
        for value in self.betas:
            if not 0 <= value < 1:
                raise ValueError(f"betas is {list(self.betas)}; expected two numbers in [0, 1)")
        if self.schedule == "wsd" and self.warmup + self.anneal > self.ipe_scale * self.epochs:
            raise ValueError(
                f"warmup {self.warmup:g} + anneal {self.anneal:g} epochs do not fit the "
                f"{self.ipe_scale * self.epochs:g} epochs (ipe_scale * epochs) of the wsd schedule"
            )
        return self

    @property
    def num_steps(self) -> int:
        assert self.ipe is not None, "the trainer sets ipe from the length of the data"
        return self.epochs * self.ipe


class TrainConfig(Section):
    """The run itself."""

    out: Path | None = None
    """Run folder; None: runs/<name>."""
    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 239
    dtype: Dtype = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graphs: Switch = "auto"
    """Capture forward, backward and update as CUDA graphs and replay them, where the run allows. `auto`: if that is
    faster in a few steps at the beginning; on a CPU never."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp`, each has the whole model and gradients are averaged; `fsdp`, each keeps a shard of
    every parameter, of the target encoder's too, and of the optimizer's state (FSDP2, ZeRO stage 3)."""
    shard_optimizer: bool = False
    """With several processes, each updates its share of the parameters only, and keeps the optimizer's moments of it
    (ZeRO stage 1). Not with dtype float16."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are averaged over several processes. bfloat16: half of the bytes, and a rounding of each
    gradient to 8 bits before and in every sum."""
    max_steps: Annotated[int, Field(ge=0)] | None = None
    """Stop after this many steps; the schedules keep their length."""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt | None = None
    """Steps between writes of latest.pt; None: every epoch."""
    keep_last: PositiveInt = 2
    """How many of the last checkpoints stay: latest.pt, and before it step<N>.pt, from which a run goes on if latest.pt
    turns out to be damaged."""
    async_checkpoint: bool = False
    """Copy what a checkpoint holds to the host's memory, and write it from there while training goes on."""
    checkpoint_format: Literal["meta", "sharded"] | None = None
    """`meta`: one file in the reference's layout, latest.pt; `sharded`: step<N>.dcp folders, to which every process
    writes its part. None: sharded with parallel=fsdp, else meta."""
    save_every_freq: int = -1
    """Epochs between the checkpoints that are kept for good as e<epoch>.pt; -1: none."""
    auto_resume: bool = False
    """Continue from latest.pt when the run folder has one, as the reference does with load_checkpoint."""
    read_checkpoint: Path | None = None
    """Continue from this checkpoint of ours or of the reference."""
    init_weights: Path | None = None
    """Start at step 0 from these weights with a new optimizer: whatever `vjepa_fast.load` opens, such as released
    weights. A run that is resumed goes on from its own checkpoint."""
    init_predictor: bool = True
    """Take the predictor of init_weights too; false: a new one, as for files that have none or a distilled model's."""
    needs_weights: bool = False
    """Refuse to train without weights to start from; set in recipes that make no sense without."""
    rollback_after: PositiveInt = 20
    """Bad steps in a row (gradients that are not finite, losses above spike_factor) after which weights, optimizer and
    target encoder go back to the last checkpoint; the data goes on behind the bad steps."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """How often a run goes back before it gives up."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above this many times the mean of those before makes a step bad; None: a finite loss never does."""
    watchdog: PositiveFloat | None = None
    """Seconds without progress after which a run says where each process is, and ends; None: it waits for ever."""
    connect_timeout: PositiveFloat = 300.0
    """Seconds that the processes of torchrun or srun wait for each other at the start."""
    tensorboard: bool = False
    probe: Switch = False
    """At the end of `vjepa-fast train`, fit linear probes on the labels of the synthetic clips (the demo); `auto`:
    where there are such. From Python: `Trainer.fit(vjepa_fast.evaluation.demo.probe_run)`."""
