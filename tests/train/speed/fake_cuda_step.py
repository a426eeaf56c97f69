"""A whole step on CUDA tensors without memory, under a watch that raises where the host would wait for the device.

Run by test_no_sync.py in a process of its own, as the tensors' gradients need a library that is loaded before torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.dynamic import Sizes
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.ops import linear
from vjepa_fast.ops.triton_support import dispatch
from vjepa_fast.train.speed.graphs import GraphedStep
from vjepa_fast.train.step import TrainStep

SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal")


class Waits(AssertionError):
    """The host would wait for the device."""


def config(frames: tuple[int, ...] = (4,), dtype: str = "float32", **changes: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "model": {
            "model_name": "vit_tiny",
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 2,
            "pred_embed_dim": 24,
            "pred_depth": 2,
            "pred_num_heads": 2,
        },
        "mask": {},
        "data": {
            "datasets": ["a"] * len(frames),
            "crop_size": 32,
            "patch_size": 8,
            "dataset_fpcs": list(frames),
            "batch_size": 4,
        },
        "loss": {},
        "optimization": {"epochs": 2, "ipe": 10, "warmup": 0},
        "train": {"dtype": dtype},
    }
    for section, values in changes.items():
        raw[section] |= values
    return Config.model_validate(raw)


def batch_of(cfg: Config, step: int) -> tuple[list[Tensor], list[MaskBatch]]:
    """Of each group, on the CPU."""
    groups = list(enumerate(dict.fromkeys(cfg.data.dataset_fpcs)))
    clips = [torch.zeros(4, frames, 32, 32, 3, dtype=torch.uint8) for _, frames in groups]
    ids = range(4 * step, 4 * step + 4)
    return clips, [MaskSampler(cfg.mask, (max(1, frames // 2), 4, 4), 0, group)(step, ids) for group, frames in groups]


def crosses(args: Any, out: Any) -> tuple[set[str], set[str]]:
    """Device types of the tensors that go in and come out."""
    return tuple({x.device.type for x in tree_leaves(part) if isinstance(x, Tensor)} for part in (args, out))


class NoWaiting(TorchDispatchMode):
    """Raises where an operator would wait; `pinned` are the host tensors that may be copied without."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        sources, _ = crosses((args, kwargs), None)
        self.num_operators += 1
        if "cuda" in sources and name in SYNCS:
            raise Waits(f"{func} of a tensor on the device")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waits(f"{func} without output_size")
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            for index in tree_leaves(args[1]):
                if isinstance(index, Tensor) and (index.dtype in (torch.bool, torch.uint8) or not index.is_cuda):
                    raise Waits(f"{func} with an index that is a mask or on the host")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "_copy_from"):
            self._check_copy(func, args, kwargs, out)
        return out

    def _check_copy(self, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        source = args[1] if func.name().startswith("aten::copy_") else args[0]
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if source.is_cuda and not out.is_cuda:
            raise Waits(f"{func} from the device to the host")
        if not source.is_cuda and out.is_cuda and not (non_blocking and id(source) in self.pinned):
            raise Waits(f"{func} of {list(source.shape)} from the host, blocking or from memory that is not pinned")


class Pinning(TorchFunctionMode):
    """Remembers what is pinned, as there is no memory to pin for a device that does not exist.

    Also raises where torch makes a tensor on the device of Python numbers, a copy that operators do not show.
    """

    def __init__(self, watch: NoWaiting) -> None:
        super().__init__()
        self.watch = watch
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            self.kept.append(args[0].clone())
            self.watch.pinned.add(id(self.kept[-1]))
            return self.kept[-1]
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            raise Waits(f"{func.__name__} of Python numbers with device=cuda")
        return func(*args, **kwargs)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """CUDA tensors without memory, on which the kernels' operators are chosen as on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.delenv("VJEPA_FAST_OPS", raising=False)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    # A shadow is vouched for by the address of its master.
    monkeypatch.setattr(linear, "_state", lambda master: (linear._num_optimizer_steps, master._version, id(master)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_fake_gpu(model: VJEPA) -> VJEPA:
    """The model with parameters on a GPU that is not there; in a fake mode only."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cuda"), p.requires_grad)
    return model


CASES = {
    "V-JEPA 2.1, videos and images": config(
        (4, 1),
        "bfloat16",
        model={
            "depth": 4,
            "rope_style": "interleaved",
            "n_output_distillation": 4,
            "img_temporal_dim_size": 1,
            "modality_embedding": True,
            "interpolate_rope": True,
        },
        loss={"predict_all": True, "weight_distance_loss": True, "lambda_warmup": [0, 2]},
        optimization={"loss_reg_std_mult": 3.0, "loss_reg_min_epoch": 0},
    ),
    "plain": config(),
    "half precision, swiglu": config(
        dtype="bfloat16", model={"use_silu": True, "use_pred_silu": True, "drop_path_rate": 0.5}
    ),
    "two lengths, no truncation": config((4, 8), mask={"truncate": "none"}, loss={"reg_coeff": 0.1}),
    "sincos, recomputed": config(model={"use_rope": False, "activation_checkpointing": "full"}),
    "recomputed selectively": config(model={"activation_checkpointing": "selective"}),
    "V-JEPA 1": config(
        model={"use_rope": False, "mask_token_by": "mask", "init": "vjepa1"}, optimization={"ipe": 1, "clip_grad": 0.1}
    ),
    "learned positions, noised targets": config(
        dtype="bfloat16",
        model={"use_rope": False, "positions": "learned", "use_mask_tokens": False},
        loss={"prediction_l2": 0.01},
    ),
}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())
def test_a_step_on_fake_cuda_tensors_never_waits(cfg, fake_gpu):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model, batches = VJEPA.from_config(cfg), [batch_of(cfg, step) for step in range(2)]
    watch = NoWaiting()
    with fake_gpu:
        train_step = TrainStep(on_fake_gpu(model), cfg)
        for step, (clips, masks) in enumerate(batches):
            clips, masks = [clip.to(device) for clip in clips], [mask.to(device) for mask in masks]
            with watch, Pinning(watch):
                result = train_step(step, clips, masks)
    assert result.loss.device.type == "cuda" and watch.num_operators > 500


class WatchedStep(GraphedStep):
    """What would be captured runs under a watch that lets nothing come from the host, pinned or not."""

    num_operators = 0

    def _aside(self, run: Callable[[], None]) -> None:
        run()

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        def watched() -> None:
            watch = NoWaiting()
            with watch, Pinning(watch):
                run()
            assert not watch.pinned
            self.num_operators += watch.num_operators

        return watched


GRAPHED = {
    "plain": {},
    "swiglu, drop path, noised targets": {
        "use_silu": True,
        "use_pred_silu": True,
        "drop_path_rate": 0.5,
        "use_mask_tokens": False,
    },
    "sincos, recomputed, a token for each mask": {
        "use_rope": False,
        "activation_checkpointing": "full",
        "mask_token_by": "mask",
    },
    "recomputed selectively": {"activation_checkpointing": "selective"},
    "pixels": {"objective": "pixels"},
}


@pytest.mark.parametrize("model", GRAPHED.values(), ids=GRAPHED.keys())
@pytest.mark.parametrize("truncate", ["batch_min", "none"])
def test_what_is_captured_takes_nothing_from_the_host(model, truncate, fake_gpu):
    # A demand is taken at its word, where there is no GPU to ask.
    cfg = config(
        dtype="bfloat16",
        model={"attention": "varlen", **model},
        mask={"truncate": truncate},
        loss={"reg_coeff": 0.0 if "objective" in model else 0.1},
        optimization={"clip_grad": 0.1},
    )
    device = torch.device("cuda")
    torch.manual_seed(0)
    jepa, batches = VJEPA.from_config(cfg), [batch_of(cfg, step) for step in range(4)]
    sizes = [Sizes.around(Sizes.of(masks) for _, (masks,) in batches)]
    with fake_gpu:
        graphed = WatchedStep(TrainStep(on_fake_gpu(jepa), cfg), sizes, pytest.fail)
        assert graphed.train_step.optimizer.layout is None
        for step, (clips, masks) in enumerate(batches):
            around = NoWaiting()
            clips, masks = [clip.to(device) for clip in clips], [mask.to(device) for mask in masks]
            with around, Pinning(around):
                result = graphed(step, clips, masks)
    assert graphed.num_replayed == 2 and graphed.num_operators > 2 * 400
    assert len(result.output.packed_predictions) == sum(masks[0].target_lengths)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: torch.ones(3).pin_memory().to(x.device),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_the_watch_sees(wait, fake_gpu):
    watch = NoWaiting()
    with fake_gpu, pytest.raises(Waits):
        x = torch.empty(3, device="cuda")
        with watch, Pinning(watch):
            wait(x)
