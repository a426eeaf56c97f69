"""The cost model: its arithmetic against an independent count, its bytes against what torch dispatches, its check."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vjepa_fast.bench.workload import LARGE, TINY
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.common.profiler_labels import backward_of
from vjepa_fast.config import load_recipe
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.check import as_table, compare
from vjepa_fast.cost.counter import Tally, count, count_step, fake_tensors
from vjepa_fast.cost.flops import step_flops
from vjepa_fast.cost.gpus import GPUS, gpu_named, gpu_of_device, with_measured
from vjepa_fast.cost.loads import Load, Loads
from vjepa_fast.cost.operations import step_operations
from vjepa_fast.cost.parameters import count_parameters
from vjepa_fast.cost.plan import draw_masks
from vjepa_fast.cost.prediction import ORDER, predict
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.train.step import TrainStep


def mean_masks(batch_size: int = 24) -> MaskBatch:
    """The mean lengths of the reference's masks at 256 px and 16 frames."""
    lengths = ((506, 130), (966, 1439))
    ids = [torch.zeros(batch_size * sum(pair), dtype=torch.int32) for pair in lengths]
    return MaskBatch((8, 16, 16), 2, batch_size, *ids, *(sum(((n,) * batch_size for n in p), ()) for p in lengths))


def without_checkpointing(recipe: str) -> Config:
    return load_recipe(recipe, ["model.use_activation_checkpointing=false"])


@pytest.mark.parametrize(("recipe", "gflop"), [("vitl16-256", 3546.6), ("vith16-256", 6469.8), ("vitg16-256", 9789.0)])
def test_arithmetic_of_the_recipes(recipe: str, gflop: float) -> None:
    """GFLOP a clip, counted independently: patches of kept tokens only, backward twice the forward."""
    cfg, masks = load_recipe(recipe), mean_masks()
    assert step_flops(cfg.model, masks).total / 24e9 == pytest.approx(gflop, rel=0.01)
    found = predict(cfg, gpu_named("h200"), [[masks]])
    assert found.flops == pytest.approx(step_flops(cfg.model, masks).total, rel=1e-9)
    # Recomputing costs time but does not count as work.
    assert found.busy > predict(without_checkpointing(recipe), gpu_named("h200"), [[masks]]).busy * 1.1


def test_masks_of_a_recipe() -> None:
    """Means over steps are near those of the reference's collator: 506 + 130 context, 966 + 1439 predicted."""
    loads = Loads.of(draw_masks(load_recipe("vitl16-256"), 24))
    assert loads.clips == 24 and loads.whole.tokens == 24 * 2048
    assert loads.context.tokens / 24 == pytest.approx(506 + 130, rel=0.1)
    assert loads.target.tokens / 24 == pytest.approx(966 + 1439, rel=0.1)
    assert loads.both.tokens == pytest.approx(loads.context.tokens + loads.target.tokens)


def test_bytes_and_launches_against_what_is_dispatched() -> None:
    """ViT-L on the kernels' path. The count charges all of queries, keys and values where RoPE touches a part of two of
    them, and the shadows as if they were read; torch's attention runs once a length and joins the results."""
    cfg, masks = LARGE.config, mean_masks()
    counted = count_step(cfg, [masks], kernels=True, make_step=TrainStep)
    operations = step_operations(cfg, Loads.of([[masks]]))
    tokens, width, depth = {"target encoder": 24 * 2048, "context encoder": 24 * 636}, 1024, 24
    for part, rel in (
        ("target encoder", 0.02),
        ("context encoder", 0.02),
        ("loss", 0.1),
        (backward_of("loss"), 0.02),
        ("optimizer", 0.1),
    ):
        modelled = sum(
            op.num_bytes for op in operations if op.part == part and op.kind == "memory" and op.name != "rope"
        )
        modelled += depth * 6 * 2 * width * tokens.get(part, 0)
        modelled += depth * 2 * 2 * width * tokens[part] if part == "context encoder" else 0
        assert modelled == pytest.approx(counted[part].elementwise_bytes, rel=rel), part
    rope = next(op for op in operations if op.part == "target encoder" and op.name == "rope")
    # 60 of the 64 elements of a head, of queries and keys, read and written.
    assert rope.num_bytes == depth * 24 * 2048 * (4 * 16 * 60 * 2 + 4)
    total = sum(counted.values(), Tally())
    assert sum(op.launches for op in operations) == pytest.approx(total.launches, rel=0.25)


def test_micro_batches_cost_launches_and_sums() -> None:
    whole, parts = (
        step_operations(
            load_recipe("vitl16-256", [f"optimization.grad_accumulation={count}"]), Loads.of([[mean_masks()]])
        )
        for count in (1, 4)
    )
    assert sum(op.flops for op in parts) == pytest.approx(sum(op.flops for op in whole))
    assert sum(op.launches for op in parts) > 3.9 * sum(op.launches for op in whole if op.part != "optimizer")
    assert sum(op.num_bytes for op in parts) > sum(op.num_bytes for op in whole)


def test_plain_pytorch_takes_longer() -> None:
    masks = TINY.masks(torch.device("cpu"))
    ours = predict(TINY.config, gpu_named("h200"), [[masks]])
    plain = predict(TINY.config, gpu_named("h200"), [[masks]], plain_step=TrainStep)
    assert plain.flops == ours.flops
    assert sum(p.launches for p in plain.parts) > 1.3 * sum(p.launches for p in ours.parts)
    assert sum(p.memory for p in plain.parts) > 1.3 * sum(p.memory for p in ours.parts)


def test_a_part_takes_the_longer_of_kernels_and_launches() -> None:
    masks = TINY.masks(torch.device("cpu"))
    slow = replace(gpu_named("h200"), launch_s=1e-3)
    found = predict(TINY.config, slow, [[masks]], loader_clips_per_s=0.5)
    assert [part.part for part in found.parts] == [
        name for name in ORDER if name != backward_of("target encoder") and name != backward_of("optimizer")
    ]
    for part in found.parts:
        assert part.total == pytest.approx(part.launches * 1e-3)
    assert found.total == TINY.batch_size / 0.5 > found.busy
    assert "loader, beside it" in found.as_table()


def test_counts_launches_and_bytes() -> None:
    def run() -> None:
        x = torch.empty(8, 4)
        y = x.t().reshape(2, 16).contiguous()
        y.add_(1)
        torch.mm(x, x.t())

    with fake_tensors():
        found = count(run)["other"]
    # The reshape of a transposed matrix copies; views, allocations and a needless contiguous() do not.
    assert dict(found.operators) == {"clone": 1, "add_": 1, "mm": 1}
    assert found.elementwise_bytes == 2 * 128 + 2 * 128
    assert found.num_bytes - found.elementwise_bytes == 128 + 128 + 8 * 8 * 4


def test_parameters() -> None:
    cfg = load_recipe("vitl16-256").model
    found = count_parameters(cfg)
    assert found.encoder == pytest.approx(303.9e6, rel=1e-3) and found.target == found.encoder
    net = VJEPA.from_config(TINY.config)
    tiny = count_parameters(TINY.config.model)
    assert tiny.trained == sum(
        p.numel() for p in (*net.encoder.parameters(), *net.predictor.parameters()) if p.requires_grad
    )


def test_attention_rates() -> None:
    h100 = GPUS["h100"]
    assert h100.attention_rate(64, 2048, "forward") == 460e12
    assert h100.attention_rate(128, 16384, "backward") == 561e12
    assert h100.attention_rate(32, 2048, "forward") == 230e12
    # 80 and 88 pay for 96 lanes.
    wide = (460 + 625) / 2
    assert h100.attention_rate(80, 2048, "forward") == pytest.approx(wide * 80 / 96 * 1e12)
    assert 392e12 < h100.attention_rate(64, 1472, "forward") < 460e12
    assert 0 < h100.attention_rate(64, 130, "forward") < 333e12
    assert h100.attention_rate(64, 1e9, "forward") == 497e12


def test_measured_rates_replace_assumed_ones() -> None:
    gpu = with_measured(
        gpu_named("H200"),
        {
            "floors": {"result": {"limits": {"bytes_per_s": 4.0e12, "flops_per_s": 700e12, "dtype": "bfloat16"}}},
            "rates": {"launch_s": 4e-6, "attention": [{"head_dim": 32, "phase": "forward", "flops_per_s": 2e14}]},
        },
    )
    assert math.isclose(gpu.matmul_rate(1024), 700e12) and math.isclose(gpu.memory_rate(), 4.0e12)
    assert gpu.attention_rate(32, 2048, "forward") == 2e14
    assert gpu.attention_rate(32, 2048, "backward") == GPUS["h200"].attention_rate(32, 2048, "backward")
    assert "attention_flops_per_s" in gpu.measured and "launch_s" in gpu.measured
    with pytest.raises(ConfigError, match="no rates"):
        with_measured(gpu, {"step": {}})
    with pytest.raises(ConfigError, match="speed"):
        with_measured(gpu, {"rates": {"speed": 1}})


def test_names_of_devices() -> None:
    known = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s",
    }
    for text, name in known.items():
        found = gpu_of_device(text)
        assert found is not None and found.name == name, text
    assert gpu_of_device("NVIDIA T4") is None and gpu_of_device("NVIDIA L40") is None


def test_check_of_a_profile() -> None:
    """A profile that was made up: one part is off, one was not foreseen."""
    rows = compare(
        {"target encoder": 70.0, "predictor": 16.0, "optimizer": 3.0},
        {"optimizer": 3.1, "target encoder": 84.0, "predictor": 16.0, "other": 2.0},
    )
    assert [row.part for row in rows] == ["target encoder", "predictor", "optimizer", "other", "step"]
    assert rows[0].ratio == pytest.approx(1.2)
    assert rows[-1].predicted == 89.0 and rows[-1].measured == pytest.approx(105.1)
    lines = as_table(rows).splitlines()
    assert [line.endswith("*") for line in lines] == [False, True, False, False, True, True]
    assert lines[1].split() == ["target", "encoder", "70.00", "84.00", "1.20", "*"]


def test_load() -> None:
    assert Load.of([3, 4]) == Load(7, 25)
    assert Load.mean([Load(7, 25), Load(9, 35)]) == Load(8, 30)
