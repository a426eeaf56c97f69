"""`swap` on Hugging Face's VJEPA2Model."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vjepa_fast as vf
from vjepa_fast.common.errors import UserError
from vjepa_fast.models import layers

transformers = pytest.importorskip("transformers")

SIDE = 24


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        **{
            "patch_size": 8,
            "crop_size": SIDE,
            "frames_per_clip": 8,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 2,
            "pred_num_mask_tokens": 3,
            "num_pooler_layers": 1,
            **options,
        }
    )
    model = transformers.VJEPA2Model(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts how often our attention is called, in its only element."""
    count, attention = [0], layers.attention

    def counting(*args: Any) -> Tensor:
        count[0] += 1
        return attention(*args)

    monkeypatch.setattr(layers, "attention", counting)
    yield count


def run(model: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Features, predictions and the gradients of both."""
    out = model(x, **options)
    found = {"features": out.last_hidden_state}
    if out.predictor_output is not None:
        found["predictions"] = out.predictor_output.last_hidden_state
    parameters = dict(model.named_parameters())
    loss = torch.stack([value.float().square().mean() for value in found.values()]).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return found | {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        difference = (found[name] - value).norm() / value.norm()
        assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize("inplace", [False, True])
def test_whole_model(inplace: bool, calls: list[int]) -> None:
    model = make()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    x = torch.randn(2, 8, 3, SIDE, SIDE)
    context, target = torch.rand(2, 36).argsort(1).split([20, 16], 1)
    options = {"context_mask": [context], "target_mask": [target]}
    expected = run(model, x), run(model, x, **options)
    fast, predictor, target_encoder = vf.swap(model, inplace=inplace)
    assert predictor is None and target_encoder is None
    assert (fast is model) == inplace and type(fast) is type(model)
    assert list(fast.state_dict()) == keys
    assert all(one is other for one, other in zip(fast.parameters(), parameters, strict=True))
    assert calls == [0]
    assert_same(run(fast, x), expected[0])
    assert_same(run(fast, x, **options), expected[1])
    assert calls == [8]


@pytest.mark.parametrize("shape", [(1, 1, 3, SIDE, SIDE), (2, 12, 3, SIDE, 40), (1, 5, 3, SIDE + 3, SIDE)])
def test_other_sizes(shape: tuple[int, ...], calls: list[int]) -> None:
    """A single frame; positions counted in squares of the trained size, as theirs are; sides that do not divide."""
    model = make()
    x = torch.randn(shape)
    assert_same(run(vf.swap(model)[0], x, skip_predictor=True), run(model, x, skip_predictor=True))
    assert calls == [0 if shape[1] == 5 else 2]


def test_encoder_alone_and_classifier(calls: list[int]) -> None:
    model = make()
    x = torch.randn(1, 8, 3, SIDE, SIDE)
    encoder, predictor, _ = vf.swap(model.encoder, model.predictor)
    features = encoder(x).last_hidden_state
    assert torch.allclose(features, model.encoder(x).last_hidden_state, atol=1e-5)
    mask = [torch.arange(36)[None]]
    assert torch.allclose(
        predictor(features, mask, mask).last_hidden_state,
        model.predictor(features, mask, mask).last_hidden_state,
        atol=1e-5,
    )
    classifier = transformers.VJEPA2ForVideoClassification(model.config).eval()
    assert torch.allclose(vf.swap(classifier)[0](x).logits, classifier(x).logits, atol=1e-5)
    assert calls == [6]


def test_half_precision(calls: list[int]) -> None:
    model = make()
    x = torch.randn(2, 8, 3, SIDE, SIDE)
    exact = model(x).last_hidden_state
    half = copy.deepcopy(model).bfloat16()
    errors = [(found(x).last_hidden_state - exact).norm().item() for found in (vf.swap(half)[0], half)]
    assert errors[0] <= 1.2 * errors[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vf.swap(model)[0](x).last_hidden_state.dtype == model(x).last_hidden_state.dtype
    assert calls == [8]


def test_hidden_states_come_from_their_layers(calls: list[int]) -> None:
    model = make()
    fast = vf.swap(model)[0]
    x = torch.randn(1, 8, 3, SIDE, SIDE)
    with pytest.warns(UserWarning, match="FastVJEPA2Encoder.*modules"):
        found = fast(x, output_hidden_states=True, skip_predictor=True).hidden_states
    expected = model(x, output_hidden_states=True, skip_predictor=True).hidden_states
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert calls == [0]
    # The recorders stay, and do nothing.
    fast(x, skip_predictor=True)
    assert calls == [2]


def test_arguments_that_want_something_go_to_their_forward(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As an encoder of an older version, which takes head masks."""
    model = make()
    original, seen = type(model.encoder).forward, []

    def forward(self: Any, pixel_values_videos: Tensor, head_mask: Any = None, **options: Any) -> Any:
        seen.append(head_mask)
        return original(self, pixel_values_videos)

    monkeypatch.setattr(type(model.encoder), "forward", forward)
    fast, x = vf.swap(model)[0].encoder, torch.randn(1, 8, 3, SIDE, SIDE)
    fast(x, head_mask=[None, None], output_attentions=False, return_dict=True)
    assert calls == [2] and not seen
    with pytest.warns(UserWarning, match="head_mask"):
        fast(x, head_mask=[None, torch.ones(1)])
    assert calls == [2] and len(seen) == 1


def test_gradient_checkpointing_and_drop_path(calls: list[int]) -> None:
    model = make()
    x = torch.randn(1, 8, 3, SIDE, SIDE)
    expected = run(model, x)
    fast = vf.swap(model)[0].train()
    fast.gradient_checkpointing_enable()
    assert_same(run(fast, x), expected)
    assert calls == [8]
    dropping, x = vf.swap(make(drop_path_rate=0.5))[0], torch.randn(8, 8, 3, SIDE, SIDE)
    assert torch.equal(dropping(x).last_hidden_state, dropping(x).last_hidden_state)
    dropping.train()
    assert not torch.equal(dropping(x).last_hidden_state, dropping(x).last_hidden_state)


def test_copies(calls: list[int]) -> None:
    fast = vf.swap(make())[0]
    x = torch.randn(1, 8, 3, SIDE, SIDE)
    expected = run(fast, x)
    assert_same(run(copy.deepcopy(fast), x), expected, 0)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert_same(run(torch.load(file, weights_only=False), x), expected, 0)
    assert calls == [12]


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"attention_probs_dropout_prob=0\.5, hidden_act=gelu_new"):
        vf.swap(make(attention_probs_dropout_prob=0.5, hidden_act="gelu_new"))

    class Adapted(nn.Linear):
        pass

    model = make()
    model.encoder.layer[1].attention.key = Adapted(48, 48)
    with pytest.raises(UserError, match=r"\bAdapted\b.*query, key or value"):
        vf.swap(model, inplace=True)
    assert type(model.predictor).__name__ == "VJEPA2Predictor"
