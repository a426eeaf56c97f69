"""Half-precision linear layers behind fp32 masters: gradients reach the masters, shadows never go stale."""

import pytest
import torch
from torch import nn

from vjepa_fast.ops.linear import Linear, drop_shadow, mark_shadow_fresh, shadow_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_reach_the_fp32_masters(dtype):
    torch.manual_seed(0)
    layer = Linear(33, 17)
    x = torch.randn(5, 7, 33)
    low = x.to(dtype).requires_grad_()
    layer(low).float().square().sum().backward()
    ours = low.grad, layer.weight.grad, layer.bias.grad
    assert [g.dtype for g in ours] == [dtype, torch.float32, torch.float32]
    exact = nn.Linear(33, 17).double()
    exact.load_state_dict(layer.state_dict())
    y = x.double().requires_grad_()
    exact(y).square().sum().backward()
    for grad, oracle in zip(ours, (y.grad, exact.weight.grad, exact.bias.grad), strict=True):
        assert (grad.double() - oracle).norm() <= 0.02 * oracle.norm()


def test_full_precision_is_plain_linear():
    layer = Linear(8, 4)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def fused_step(p):
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()


CHANGES = {
    "fused optimizer": fused_step,
    "in place": lambda p: p.mul_(2),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "assigned storage": lambda p: setattr(p, "data", p.data * 2),
    "copied": lambda p: p.copy_(p * 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_a_vouched_shadow_dies_with_its_master(change):
    p = nn.Parameter(torch.randn(4, 4))
    mark_shadow_fresh(p, p.to(torch.bfloat16))
    assert shadow_of(p, torch.bfloat16) is shadow_of(p, torch.bfloat16)
    assert shadow_of(p, torch.float16).dtype == torch.float16
    change(p)
    assert torch.equal(shadow_of(p, torch.bfloat16), p.to(torch.bfloat16))


@torch.no_grad()
def test_writes_through_data_are_seen_where_nobody_vouched():
    layer = Linear(4, 4, bias=False)
    x = torch.eye(4, dtype=torch.bfloat16)
    layer(x)
    layer.weight.data.mul_(3)
    assert torch.equal(layer(x), layer.weight.T.to(torch.bfloat16))
    mark_shadow_fresh(layer.weight, layer.weight.to(torch.bfloat16))
    layer.weight.data.mul_(3)
    drop_shadow(layer.weight)
    assert torch.equal(layer(x), layer.weight.T.to(torch.bfloat16))
