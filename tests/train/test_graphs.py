"""Steps as CUDA graphs: on the CPU with recordings in their place, on a GPU with graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.attention_stand_ins import only
from tests.train.recorded import RecordedStep, adamw_ema_by_device_
from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops import _attention_choice as choice
from vjepa_fast.train import graphs, optim
from vjepa_fast.train.step import TrainStep


def config(dtype: str = "float32", truncate: str = "batch_min", reg_coeff: float = 0.0, **model) -> Config:
    return Config.model_validate({
        "model": {"model_name": "vit_tiny", "embed_dim": 48, "depth": 2, "num_heads": 2, "pred_embed_dim": 32,
                  "pred_depth": 2, "pred_num_heads": 2, "zero_init_mask_tokens": False, **model},
        "mask": {"truncate": truncate},
        "loss": {"reg_coeff": reg_coeff},
        "data": {"crop_size": 48, "patch_size": 8, "dataset_fpcs": [4], "batch_size": 3},
        # With a small eps the first steps are lr times the signs of gradients, some of which are rounding alone.
        "optimization": {"epochs": 2, "ipe": 20, "warmup": 0.5, "start_lr": 1e-4, "lr": 3e-3, "final_lr": 1e-3,
                         "weight_decay": 0.04, "final_weight_decay": 0.4, "ema": [0.9, 1.0], "eps": 1e-4},
        "train": {"dtype": dtype},
    })


def train_step(cfg: Config, device: str = "cpu") -> TrainStep:
    torch.manual_seed(0)
    return TrainStep(VJEPA(cfg.model).to(device), cfg)


def batch(step: int, cfg: Config, device: str = "cpu") -> tuple[Tensor, MaskBatch]:
    clips = torch.randint(
        0, 256, (3, 4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return clips.to(device), MaskSampler(cfg.mask, (2, 6, 6), 0)(step, range(3 * step, 3 * step + 3), device)


def expected(cfg: Config, num_steps: int = 20) -> list[Sizes]:
    return [Sizes.of(batch(step, cfg)[1]) for step in range(num_steps)]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Attention that reads lengths from tensors only; two buckets at first, captured after one step each."""
    monkeypatch.setattr(choice, "time_ms", lambda *_: 1.0)
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    monkeypatch.setattr(graphs, "NUM_BUCKETS", 2)
    monkeypatch.setattr(graphs, "UNIT", 8)
    with only(monkeypatch, ("fa2",), tmp_path):
        yield


def by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that reads its values from tensors only, from here on."""
    monkeypatch.setattr(optim, "use_triton", lambda _: True)
    monkeypatch.setattr(optim, "adamw_ema_", adamw_ema_by_device_)


def assert_same(ours: torch.nn.Module, oracle: torch.nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + b.numel() ** 0.5 * 1e-2), name


CASES = {
    "plain": {},
    "no truncation, variance term": {"truncate": "none", "reg_coeff": 0.1},
    "sincos, swiglu, recomputed": {"use_rope": False, "use_silu": True, "use_pred_silu": True,
                                   "activation_checkpointing": "full"},
    "drop path, half precision": {"drop_path_rate": 0.5, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_replays_equal_eager_steps(case: dict, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(**case)
    plain, graphed = train_step(cfg), RecordedStep(train_step(cfg), expected(cfg), pytest.fail)
    results = []
    for run in (plain, graphed):
        some = []
        for step in range(10):
            torch.manual_seed(step)
            result = run(step, *batch(step, cfg))
            # The target encoder's features lie in memory that the next step overwrites.
            some.append((result, result.output.packed_targets.clone()))
        results.append(some)
        by_device(monkeypatch)
    half = cfg.model.dtype != "float32"
    for (oracle, oracle_targets), (ours, targets) in zip(*results, strict=True):
        assert float(ours.loss) == pytest.approx(float(oracle.loss), rel=2e-2 if half else 1e-6)
        assert float(ours.grad_norm) == pytest.approx(float(oracle.grad_norm), rel=5e-2 if half else 1e-5)
        assert (ours.lr, ours.weight_decay, ours.momentum) == (oracle.lr, oracle.weight_decay, oracle.momentum)
        assert ours.output.packed_predictions.shape == oracle.output.packed_predictions.shape
        torch.testing.assert_close(targets, oracle_targets, rtol=1e-4, atol=0.2 if half else 1e-5)
    assert len(graphed.buckets) == 2 and all(bucket.replay for bucket in graphed.buckets)
    assert graphed.num_replayed == 8 and graphed.num_eager == 0
    assert_same(graphed.train_step.model, plain.model, 2e-2 if half else 1e-6)
