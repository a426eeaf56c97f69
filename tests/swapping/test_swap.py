"""`swap` on stand-ins for Meta's modules: same outputs, gradients and parameters, and what goes on working."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vjepa_fast as vf
from tests.swapping.cases import CASES, EVERY_CASE, Three, assert_same, flatten, run, v1, v2, v21
from vjepa_fast.common.errors import UserError

from .stand_ins import DEPTH, PRED_DEPTH, V1, V2, V21, make_clips, make_masks

pytestmark = pytest.mark.usefixtures("same_start")


@pytest.mark.parametrize("inplace", [False, True])
@EVERY_CASE
def test_same_outputs_and_gradients(case: str, inplace: bool, calls: list[int]) -> None:
    make, frames = CASES[case]
    given = make()
    expected = run(given, frames)
    assert calls == [0]
    keys = [list(module.state_dict()) for module in given]
    tensors = [list(module.parameters()) for module in given]
    fast = vf.swap(*given, inplace=inplace)
    assert_same(run(fast, frames), expected)
    # One pass of each network for all masks and groups.
    once = [2 * len(given[0].backbone.blocks) + PRED_DEPTH]
    assert calls == once
    for module, before, key, parameters in zip(fast, given, keys, tensors, strict=True):
        assert (module is before) == inplace
        assert list(module.state_dict()) == key
        assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
        assert isinstance(module, type(before)) and isinstance(module.backbone, type(before.backbone))
    if not inplace:
        assert_same(run(given, frames), expected, 0)
        assert calls == once


@pytest.mark.parametrize("version", [v1, v2])
def test_fp64(version: Callable[[], Three]) -> None:
    modules = version()
    for module in modules:
        module.double()
    assert_same(run(vf.swap(*modules), dtype=torch.float64), run(modules, dtype=torch.float64), 1e-12)


def test_modules_without_their_wrappers(calls: list[int]) -> None:
    encoder, predictor, _ = v2()
    fast, fast_predictor, nothing = vf.swap(encoder.backbone, predictor.backbone)
    assert nothing is None
    clips, (context, target) = make_clips(2), make_masks(2, 8, 0)
    for masks in (None, context[0], [context[0]], [context[0], context[0].roll(1, 0)]):
        assert_same({"z": fast(clips, masks)}, {"z": encoder.backbone(clips, masks)})
    z = encoder.backbone(clips, context[0])
    for index in (0, 5):
        assert_same(
            {"y": fast_predictor(z, context[0], target[0], index)},
            {"y": predictor.backbone(z, context[0], target[0], index)},
        )
    assert_same(
        {"y": fast_predictor(z, [context[0]], [target[0]])}, {"y": predictor.backbone(z, context[0], target[0])}
    )
    fast.out_layers = encoder.backbone.out_layers = [0, 1]
    found, expected = fast(clips), encoder.backbone(clips)
    assert len(found) == 2
    assert_same(dict(zip("ab", found, strict=True)), dict(zip("ab", expected, strict=True)))
    assert calls[0] == DEPTH * 5 + PRED_DEPTH * 3


def test_fewer_frames_are_placed_as_each_version_does() -> None:
    """V-JEPA 1 stretches its table, V-JEPA 2 cuts it; the stand-ins cut both."""
    clips = make_clips(2, 4)
    encoder = V2.VisionTransformer(rope=False)
    assert_same({"z": vf.swap(encoder)[0](clips)}, {"z": encoder(clips)})
    first = V1.VisionTransformer()
    fast = vf.swap(first)[0]
    assert not torch.allclose(fast(clips), first(clips), atol=1e-3)
    table = first.pos_embed.detach().view(1, 4, 3, 3, -1).movedim(-1, 1)
    stretched = nn.functional.interpolate(table, scale_factor=(0.5, 1, 1), mode="trilinear").flatten(2).mT
    first.pos_embed = nn.Parameter(stretched, requires_grad=False)
    assert_same({"z": fast(clips)}, {"z": first(clips)})


def test_outputs_of_v21_outside_of_training(calls: list[int]) -> None:
    encoder, predictor, _ = v21()
    fast, fast_predictor, _ = vf.swap(encoder, predictor)
    clips, (context, target) = make_clips(2), make_masks(2, 8, 0)
    for part, other in ((fast, encoder), (fast.backbone, encoder.backbone)):
        given = [clips] if part is fast else clips
        for setting in ({"return_hierarchical": False}, {"return_hierarchical": True}, {"out_layers": [1, 3]}):
            for name, value in setting.items():
                setattr(fast.backbone, name, value)
                setattr(encoder.backbone, name, value)
            found, expected = (flatten(module(given)) for module in (part, other))
            assert_same(dict(enumerate(found)), dict(enumerate(expected)))
        fast.backbone.out_layers = encoder.backbone.out_layers = None
    z = encoder.backbone(clips, context[0], training=True)
    found, expected = (flatten(module.backbone(z, context[0], target[0])) for module in (fast_predictor, predictor))
    assert_same(dict(enumerate(found)), dict(enumerate(expected)))
    assert calls == [6 * 4 + PRED_DEPTH]
    encoder.backbone.blocks[0].attn.n_registers = 2
    with pytest.raises(UserError, match="n_registers=2"):
        vf.swap(encoder)


def test_optimizer_and_moving_average_of_the_user() -> None:
    """Three steps with torch's AdamW and writes through `.data`, as V-JEPA 1 averages, beside the same with theirs."""
    weights = []
    for swapped in (False, True):
        torch.manual_seed(0)
        modules = v1()
        for module in modules:
            module.double()
        names = [n for n, p in (*modules[0].named_parameters(), *modules[1].named_parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [p for module in modules[:2] for p in module.parameters() if p.requires_grad], lr=1e-3
        )
        if swapped:
            modules = vf.swap(*modules, inplace=True)
        for _ in range(3):
            run(modules, dtype=torch.float64)
            optimizer.step()
            for new, old in zip(modules[0].parameters(), modules[2].parameters(), strict=True):
                old.data.mul_(0.9).add_(0.1 * new.detach().data)
        # A bias of the keys gets noise for a gradient, which Adam makes as large as any.
        weights.append(
            [
                value
                for module in modules
                for name, value in module.state_dict().items()
                if not name.endswith("qkv.bias")
            ]
        )
        assert len(names) == len(optimizer.state)
    for found, expected in zip(*reversed(weights), strict=True):
        assert (found - expected).abs().max() <= 1e-9


def test_copies_checkpoints_and_moves(calls: list[int]) -> None:
    fast = vf.swap(*v2())
    expected = run(fast)
    copied = tuple(copy.deepcopy(module) for module in fast)
    assert not {*copied[0].parameters()} & {*fast[0].parameters()}
    assert_same(run(copied), expected, 0)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert_same(run(torch.load(file, weights_only=False)), expected, 0)
    other = vf.swap(*v2())
    assert run(other).keys() == expected.keys()
    for module, source, assign in zip(other, fast, (False, True, False), strict=True):
        module.load_state_dict(source.state_dict(), assign=assign)
    for parameter in other[1].parameters():
        parameter.requires_grad_(True)
    assert_same(run(other), expected, 0)
    for module in other:
        module.double()
    assert_same(run(other, dtype=torch.float64), expected)
    assert calls == [6 * (2 * DEPTH + PRED_DEPTH)]


def test_drop_path_and_modes() -> None:
    fast, _, _ = vf.swap(v2(drop_path=0.5)[0])
    clips = [make_clips(8)]
    whole = fast.eval()(clips)[0]
    assert torch.equal(fast(clips)[0], whole)
    fast.train()
    dropped = fast(clips)[0]
    assert not torch.allclose(dropped, whole)
    fast.backbone.blocks.eval()
    assert torch.equal(fast(clips)[0], whole)


def test_activation_checkpointing(calls: list[int]) -> None:
    modules = v2()
    expected = run(modules)
    fast = vf.swap(*modules)
    fast[0].backbone.use_activation_checkpointing = True
    assert_same(run(fast), expected)
    # Blocks of the encoder run again in the backward.
    assert calls == [3 * DEPTH + PRED_DEPTH]


def test_hooks_run_their_own_modules(calls: list[int]) -> None:
    modules = vf.swap(*v2())
    expected = run(modules)
    calls[0] = 0
    seen: list[Any] = []
    handle = modules[0].backbone.blocks[1].register_forward_hook(lambda *args: seen.append(args[2].shape))
    with pytest.warns(UserWarning, match=r"FastVisionTransformer.*hook.*blocks\.1"):
        assert_same(run(modules), expected)
    assert len(seen) == 2 and calls == [DEPTH + PRED_DEPTH]
    handle.remove()
    # A hook on the whole encoder sees every mask.
    modules[0].backbone.register_forward_hook(lambda *args: seen.append(args[2].shape))
    calls[0] = 0
    assert_same(run(modules), expected)
    assert len(seen) == 4 and calls == [3 * DEPTH + PRED_DEPTH]


def test_hooks_of_before_report_to_whoever_set_them() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.shapes: list[Any] = []

        def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.shapes.append(output.shape)

    encoder, recorder = v2()[0].backbone, Recorder()
    encoder.register_forward_hook(recorder.hook)
    vf.swap(encoder)[0](make_clips(1))
    assert len(recorder.shapes) == 1


def test_layers_that_are_exchanged_afterwards(calls: list[int]) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    encoder = v2()[0].backbone
    fast = vf.swap(encoder)[0]
    clips = make_clips(2)
    fast(clips)
    new = nn.Linear(48, 48)
    fast.blocks[0].attn.proj = encoder.blocks[0].attn.proj = new
    assert_same({"z": fast(clips)}, {"z": encoder(clips)})
    assert calls[0] == 2 * DEPTH
    fast.blocks[0].attn.proj = encoder.blocks[0].attn.proj = Scaled(48, 48)
    with pytest.warns(UserWarning, match=r"parameters.*blocks\.0\.attn\.proj"):
        assert_same({"z": fast(clips)}, {"z": encoder(clips)})
    assert calls[0] == 2 * DEPTH


def _with(module: nn.Module, path: str, value: Any) -> nn.Module:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, value)
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), r"encoder .*torch\.nn\.modules\.linear\.Linear.* VisionTransformer"),
        (lambda: V2.VisionTransformerPredictor(), "VisionTransformerPredictor.* encoder"),
        (lambda: "vit_large", r"encoder .*\bstr\b.* torch\.nn\.Module"),
        (
            lambda: _with(V2.VisionTransformer(), "blocks.1.attn.attn_drop.p", 0.1),
            r"VisionTransformer .*attn_drop=0\.1",
        ),
        (lambda: _with(V2.VisionTransformer(), "blocks.1.attn.is_causal", True), "causal"),
        (lambda: _with(V2.VisionTransformer(), "blocks.1.mlp.act", nn.GELU("tanh")), r"GELU\(.*tanh"),
        (
            lambda: _with(_with(V2.VisionTransformer(), "blocks.0.attn.scale", 0.1), "blocks.0.attn.use_sdpa", False),
            r"qk_scale=0\.1",
        ),
        (
            lambda: _with(V2.VisionTransformer(), "blocks.0.gate", nn.Linear(2, 2)),
            r"VisionTransformer .*blocks\.0\.gate",
        ),
        (
            lambda: _with(V2.VisionTransformer(), "forward", lambda x, masks: x),
            "forward of the encoder.s VisionTransformer has been replaced",
        ),
        (lambda: _with(V21.VisionTransformer(), "use_rope", False), "use_rope=false"),
        (lambda: _with(V21.VisionTransformer(), "img_temporal_dim_size", 2), r"img_temporal_dim_size\b.*\b2\b.*\b1\b"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    module = make()
    before = type(module)
    with pytest.raises(UserError, match=message):
        vf.swap(module, inplace=True)
    assert type(module) is before


def test_nothing_is_changed_when_one_is_refused() -> None:
    encoder, predictor, _ = v2()
    predictor.backbone.return_all_tokens = True
    with pytest.raises(UserError, match="return_all_tokens"):
        vf.swap(encoder, predictor, inplace=True)
    assert type(encoder) is V2.MultiSeqWrapper and type(encoder.backbone) is V2.VisionTransformer


def test_swapping_twice_is_swapping_once() -> None:
    encoder = vf.swap(v2()[0])[0]
    again = vf.swap(encoder, inplace=True)[0]
    assert again is encoder
    assert type(vf.swap(encoder)[0]) is type(encoder)
    wrapper = v2()[0]
    vf.swap(wrapper.backbone, inplace=True)
    assert type(vf.swap(wrapper)[0]) is type(encoder)


def test_ids_outside_the_clip() -> None:
    fast = vf.swap(v2()[0])[0]
    with pytest.raises(ValueError, match=r"mask.*\b99\b.*\b35\b"):
        fast([make_clips(1)], [[torch.tensor([[0, 99]])]])
