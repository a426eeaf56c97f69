"""Rows in float8 by kernel and by PyTorch, and products of them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.packed import config, make_batch
from tests.ops.conftest import FAR, far_rows
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops import fp8_linear
from vjepa_fast.ops.fp8_linear import check_device, quantise_rows, quantise_rows_ref, serves
from vjepa_fast.ops.linear import Linear
from vjepa_fast.ops.triton_support import dispatch


def rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    g = torch.Generator().manual_seed(count * 10007 + width)
    # Rows of very different sizes.
    return (torch.randn(count, width, generator=g) * 10.0 ** torch.randint(-4, 4, (count, 1), generator=g)).to(
        device, dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count, width", [(1, 1), (3, 16), (13, 31), (7, 257), (5, 1024), (0, 8)])
def test_kernel_equals_pytorch(kernels, count, width, dtype):
    x = rows(count, width, dtype, kernels)
    found, scale = quantise_rows(x)
    expected, expected_scale = quantise_rows_ref(x)
    assert dispatch.launches["_quantise_rows_kernel"] == bool(count)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # Dividing by a scale that differs by a rounding may move a number to its neighbour.
    assert (found.float() != expected.float()).float().mean() <= 0.01 or not count
    error = (found.float() * scale - x.float()).abs()
    assert bool((error <= x.float().abs() / 16 + scale * 2.0**-10).all())


def test_zeros_and_what_is_not_finite(kernels):
    x = torch.ones(4, 40, device=kernels)
    x[0] = 0
    x[1, 7] = torch.nan
    x[2, 30] = torch.inf
    for quantise in (quantise_rows, quantise_rows_ref):
        found, scale = quantise(x)
        values = found.float() * scale
        assert torch.equal(values[0], x[0]) and torch.equal(values[3], x[3])
        assert values[1].isnan().all() and not values[2].isfinite().any()


def test_strided_rows(kernels):
    x = torch.full((6, 90), torch.nan, device=kernels)
    x[:, 30:60] = rows(6, 30, torch.float32, kernels)
    found, scale = quantise_rows(x[:, 30:60])
    expected, expected_scale = quantise_rows(x[:, 30:60].contiguous())
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)


def test_rows_beyond_two_to_the_31_elements(kernels):
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    x = rows(3, 16, torch.float32, kernels)
    y, scale = torch.zeros(3, 16, dtype=torch.float8_e4m3fn), torch.zeros(3)
    dispatch.launch(fp8_linear._quantise_rows_kernel, (3,), far_rows(x), y, scale, FAR, 16, BLOCK=16)
    assert torch.equal(y.view(torch.uint8), quantise_rows(x)[0].view(torch.uint8))


def test_registration(kernels):
    x = rows(5, 48, torch.bfloat16, kernels)
    torch.library.opcheck(torch.ops.vjepa_fast.quantise_rows.default, (x,))
    compiled = torch.compile(lambda t: quantise_rows(t * 2)[1] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantise_rows(x * 2)[1] + 1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_is_that_of_the_quantised_operands(dtype, with_bias):
    x, weight = rows(9, 64, dtype, torch.device("cpu")).view(3, 3, 64), rows(48, 64, torch.float32, torch.device("cpu"))
    bias = torch.randn(48) if with_bias else None
    out = fp8_linear.fp8_linear(x, weight, bias)
    (a, a_scale), (b, b_scale) = quantise_rows_ref(x.view(9, 64)), quantise_rows_ref(weight)
    expected = (a.float() * a_scale) @ (b.float() * b_scale).t() + (0 if bias is None else bias.bfloat16().float())
    assert out.shape == (3, 3, 48) and out.dtype == dtype
    size = (x.view(9, 64).float().abs() @ weight.abs().t()).view(3, 3, 48)
    assert bool(((out.float() - expected.view(3, 3, 48)).abs() <= 2.0**-7 * size + 0.02).all())
    assert fp8_linear.fp8_linear(x[:0], weight, bias).shape == (0, 3, 48)


def test_widths_that_do_not_fit():
    assert serves(torch.zeros(32, 48)) and not serves(torch.zeros(30, 48)) and not serves(torch.zeros(32, 47))


def build(precision: str) -> tuple[VJEPA, Config]:
    cfg = config(fpcs=(4,), target_precision=precision)
    torch.manual_seed(0)
    return VJEPA.from_config(cfg), cfg


def test_only_the_target_encoder_is_rounded():
    (model, cfg), (exact, _) = build("float8"), build("same")
    low = {name for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.float8}
    assert low and all(name.startswith("target_encoder.blocks.") for name in low)
    clips, masks = make_batch(cfg)
    ours, theirs = model(clips, masks), exact(clips, masks)
    assert torch.equal(ours.packed_predictions, theirs.packed_predictions)
    cosine = torch.nn.functional.cosine_similarity(ours.packed_targets, theirs.packed_targets, dim=-1)
    assert 0.98 < cosine.min() < 1.0
    ours.loss.backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert model.state_dict().keys() == exact.state_dict().keys()


def test_old_gpus_are_named(monkeypatch):
    monkeypatch.setattr(fp8_linear, "capability", lambda device: 80)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"A100 has compute capability 8\.0"):
        check_device(torch.device("cuda"))
    check_device(torch.device("cpu"))


COMPILED = {
    "quantise_rows bf16 1024": lambda: fp8_linear._quantise_rows(torch.zeros(64, 1024, dtype=torch.bfloat16)) and None,
    "quantise_rows fp32 4096": lambda: fp8_linear._quantise_rows(torch.zeros(64, 4096)) and None,
}
"""What tests/aot compiles."""
COMPILED_FROM = 90
"""Compute capability: earlier GPUs have no float8."""
