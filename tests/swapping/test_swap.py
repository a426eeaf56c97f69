"""`swap` on stand-ins for Meta's modules: same outputs, gradients and parameters, and what goes on working."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vjepa_fast as vf
from vjepa_fast.common.errors import UserError
from vjepa_fast.models import layers

from .stand_ins import DEPTH, PRED_DEPTH, V1, V2, V21, make_clips, make_masks, randomise

Three = tuple[Any, Any, Any]


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its own modules")
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often our attention is called, in its only element."""
    count, attention = [0], layers.attention

    def counting(*args: Any) -> Tensor:
        count[0] += 1
        return attention(*args)

    monkeypatch.setattr(layers, "attention", counting)
    return count


def v1(num_mask_tokens: int = 2) -> Three:
    return _three(
        V1.MultiMaskWrapper(V1.VisionTransformer()),
        V1.PredictorMultiMaskWrapper(V1.VisionTransformerPredictor(num_mask_tokens)),
    )


def v2(**options: Any) -> Three:
    predictor = V2.VisionTransformerPredictor(**{key: value for key, value in options.items() if key != "drop_path"})
    return _three(V2.MultiSeqWrapper(V2.VisionTransformer(**options)), V2.PredictorMultiSeqWrapper(predictor))


def _three(encoder: nn.Module, predictor: nn.Module) -> Three:
    randomise(encoder, predictor)
    target = copy.deepcopy(encoder).requires_grad_(False)
    randomise(target)
    return encoder, predictor, target


def v21(return_all_tokens: bool = True) -> Three:
    return _three(
        V21.MultiSeqWrapper(V21.VisionTransformer()),
        V21.PredictorMultiSeqWrapper(V21.VisionTransformerPredictor(return_all_tokens)),
    )


def run(modules: Three, frames: tuple[int, ...] = (8,), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Everything that a training step computes, under the names of what it is."""
    encoder, predictor, target = modules
    torch.manual_seed(1)
    clips = [make_clips(3, count).to(dtype) for count in frames]
    pairs = [make_masks(3, count, seed) for seed, count in enumerate(frames)]
    masks_enc, masks_pred = [p[0] for p in pairs], [p[1] for p in pairs]
    for parameter in encoder.parameters():
        parameter.grad = None
    for parameter in predictor.parameters():
        parameter.grad = None
    options = {"training_mode": True} if hasattr(_plain(encoder).backbone, "norms_block") else {}
    with torch.no_grad():
        h = target(clips[0] if "MultiMask" in type(_plain(encoder)).__name__ else clips, **options)
    if isinstance(h, Tensor):
        z = encoder(clips[0], masks_enc[0])
        targets = [h[:, : ids.shape[1]] for ids in masks_pred[0]]
        y = predictor(z, targets, masks_enc[0], masks_pred[0])
    elif options:
        z = encoder(clips, masks_enc, **options)
        y = predictor(z, masks_enc, masks_pred, mod="image" if frames == (1,) else "video")
    else:
        z = encoder(clips, masks_enc)
        y = predictor(z, masks_enc, masks_pred)
    sum(out.square().mean() for out in flatten(y)).backward()
    outputs = (("h", h), ("z", z), ("y", y))
    found = {f"{name} {i}": out for name, value in outputs for i, out in enumerate(flatten(value))}
    return found | {
        name: parameter.grad
        for part in modules[:2]
        for name, parameter in part.named_parameters()
        if parameter.grad is not None
    }


def _plain(module: Any) -> Any:
    while hasattr(module, "_orig_mod") or isinstance(module, nn.parallel.DistributedDataParallel):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def flatten(value: Any) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else [out for part in value for out in flatten(part)]


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if str(name).endswith("qkv.bias"):
            # Without RoPE a bias of the keys changes nothing: what is there is noise.
            parts = [torch.cat([x[: len(x) // 3], x[2 * len(x) // 3 :]]) for x in (found[name], value)]
        else:
            parts = [found[name], value]
        difference = (parts[0].double() - parts[1].double()).norm() / parts[1].double().norm()
        assert difference <= tolerance, (name, difference)


CASES: dict[str, tuple[Callable[[], Three], tuple[int, ...]]] = {
    "v1": (v1, (8,)),
    "v1 noised targets": (lambda: v1(0), (8,)),
    "v2": (v2, (8,)),
    "v2 two groups": (v2, (8, 4)),
    "v2 sincos two groups": (lambda: v2(rope=False), (8, 4)),
    "v2 swiglu": (lambda: v2(silu=True), (8,)),
    "v2.1": (v21, (8,)),
    "v2.1 images, one head": (lambda: v21(False), (1,)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


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


@pytest.mark.parametrize("whole", [False, True], ids=["in place", "torch.compile"])
@pytest.mark.parametrize("first", [False, True], ids=["swapped, then compiled", "compiled, then swapped"])
def test_compiled(first: bool, whole: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether the parts of our blocks would be compiled is asked, but compiling takes too long.
    asked = []
    monkeypatch.setattr(layers, "_may_compile", lambda *args: asked.append(args) or False)

    def compiled(module: nn.Module) -> Any:
        if whole:
            return torch.compile(module, backend="eager")
        module.compile(backend="eager")
        return module

    given = v2()
    expected = run(given)
    if first:
        modules = vf.swap(*(compiled(module) for module in given))
        assert all((type(module).__name__ == "OptimizedModule") == whole for module in modules)
    else:
        modules = tuple(compiled(module) for module in vf.swap(*given))
    found = run(modules)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)
    assert calls == [2 * DEPTH + PRED_DEPTH]
    assert len(asked) == (0 if whole else 2 * DEPTH + PRED_DEPTH)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("first", [False, True], ids=["swapped, then DDP", "DDP, then swapped"])
def test_data_parallel(first: bool, calls: list[int]) -> None:
    parallel = nn.parallel.DistributedDataParallel
    given = v2()
    expected = run(given)

    def wrap(modules: Three) -> Three:
        encoder, predictor, target = modules
        target.requires_grad_(True)
        wrapped = (
            parallel(encoder, static_graph=True),
            parallel(predictor, find_unused_parameters=True),
            parallel(target),
        )
        target.requires_grad_(False)
        return wrapped

    if first:
        wrapped = wrap(given)
        modules = vf.swap(*wrapped)
        assert all(one is other for one, other in zip(modules, wrapped, strict=True))
        assert all(module.module is not inner for module, inner in zip(modules, given, strict=True))
    else:
        modules = wrap(vf.swap(*given))
    for _ in range(2):
        found = {name.removeprefix("module."): value for name, value in run(modules).items()}
    assert_same(found, expected)
    assert calls == [2 * (2 * DEPTH + PRED_DEPTH)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """In the dtypes that theirs returns.

    Our predictor's residual stream is in half precision, theirs is fp32; all errors together are a fifth larger.
    """
    modules = v2()
    exact = run(modules)
    with torch.autocast("cpu", dtype=dtype):
        theirs, ours = run(modules), run(vf.swap(*modules))
    assert theirs.keys() == ours.keys()
    errors = torch.zeros(2, dtype=torch.float64)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        pair = [((found[name].double() - value.double()).norm() / value.double().norm()) for found in (ours, theirs)]
        errors += torch.stack(pair).detach()
    assert errors[0] <= 1.4 * errors[1]


def test_autocast_on_a_gpu() -> None:
    """There norms return fp32 under autocast, and the branches of a residual stream its dtype."""
    fast = vf.swap(v2()[0])[0].backbone
    network, clips = vars(fast)["_vf_view"].network, make_clips(1)
    exact = fast(clips)
    was_on, was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with network.casting(torch.device("cuda")):
            features = network(clips)
    finally:
        torch.set_autocast_enabled("cuda", was_on)
        torch.set_autocast_dtype("cuda", was)
    assert features.dtype == torch.float32
    # They are not rounded to bf16 and back.
    assert not torch.equal(features, features.bfloat16().float())
    difference = ((features - exact).norm() / exact.norm()).item()
    assert 1e-4 < difference < 2e-2


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
        (
            lambda: nn.Linear(2, 2),
            r"the encoder is a torch\.nn\.modules\.linear\.Linear, which is not known; expected "
            r"VisionTransformer",
        ),
        (
            lambda: V2.VisionTransformerPredictor(),
            "is a VisionTransformerPredictor, which is a predictor; expected an encoder",
        ),
        (lambda: "vit_large", "the encoder is a str; expected a torch.nn.Module"),
        (
            lambda: _with(V2.VisionTransformer(), "blocks.1.attn.attn_drop.p", 0.1),
            "this VisionTransformer has attn_drop=0.1, which",
        ),
        (lambda: _with(V2.VisionTransformer(), "blocks.1.attn.is_causal", True), "has causal attention"),
        (lambda: _with(V2.VisionTransformer(), "blocks.1.mlp.act", nn.GELU("tanh")), r"has GELU\(.*tanh"),
        (
            lambda: _with(_with(V2.VisionTransformer(), "blocks.0.attn.scale", 0.1), "blocks.0.attn.use_sdpa", False),
            "has qk_scale=0.1",
        ),
        (
            lambda: _with(V2.VisionTransformer(), "blocks.0.gate", nn.Linear(2, 2)),
            r"swap: VisionTransformer has .* see blocks\.0\.gate",
        ),
        (
            lambda: _with(V2.VisionTransformer(), "forward", lambda x, masks: x),
            "forward of the encoder.s VisionTransformer has been replaced",
        ),
        (lambda: _with(V21.VisionTransformer(), "use_rope", False), "has use_rope=false"),
        (lambda: _with(V21.VisionTransformer(), "img_temporal_dim_size", 2), "img_temporal_dim_size is 2; expected 1"),
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
