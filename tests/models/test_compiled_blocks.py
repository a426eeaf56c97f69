"""The compiled parts of a block: the same results as eagerly, one compilation for all layers, none after warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler

from tests.helpers.packed import MASKS, gradients
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler
from vjepa_fast.models import compiled_blocks
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.layers import make_blocks, run_blocks, set_compiled
from vjepa_fast.ops.packing import Packing
from vjepa_fast.train.step import TrainStep

# Compiling takes seconds each time.
pytestmark = pytest.mark.slow


def settings(dtype: str = "float32", **model) -> Config:
    return Config.model_validate(
        {
            "model": {
                "model_name": "vit_tiny",
                "embed_dim": 48,
                "depth": 2,
                "num_heads": 2,
                "pred_embed_dim": 24,
                "pred_depth": 2,
                "pred_num_heads": 2,
                "zero_init_mask_tokens": False,
                "compile_model": True,
                **model,
            },
            "mask": {"masks": MASKS},
            "data": {"crop_size": 64, "patch_size": 8, "batch_size": 2, "dataset_fpcs": [8]},
            "optimization": {"warmup": 0},
            "train": {"dtype": dtype},
        }
    )


def make_batch(step: int, cfg: Config) -> tuple[Tensor, MaskBatch]:
    clips = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return clips, MaskSampler(cfg.mask, (4, 8, 8), seed=0)(step, range(2 * step, 2 * step + 2))


PACKING = Packing((3, 4), torch.tensor([0, 3, 7], dtype=torch.int32))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Nothing is compiled yet; traced and differentiated as usual, but no code is generated, which takes a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled_blocks, "_compiled", {})
    yield compiled_blocks._compiled


def same_gradients(ours: dict[str, Tensor], oracle: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == oracle.keys()
    whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in oracle.values()]))
    for name, grad in ours.items():
        difference = (grad - oracle[name]).norm()
        assert difference <= tolerance * oracle[name].norm() or difference <= 1e-2 * tolerance * whole, name


CASES = {
    "swiglu, drop path": {"use_silu": True, "use_pred_silu": True, "drop_path_rate": 0.5},
    "half precision, recomputed": {"dtype": "bfloat16", "activation_checkpointing": "full"},
    "sincos, recomputed selectively": {"use_rope": False, "activation_checkpointing": "selective"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_same_loss_and_gradients_as_eagerly(case, compiled):
    cfg = settings(**case)
    torch.manual_seed(0)
    model = VJEPA.from_config(cfg)
    results = []
    for on in (True, False):
        set_compiled(model, on)
        torch.manual_seed(1)
        out = model(*make_batch(0, cfg))
        results.append((out.loss.detach(), gradients(model, out.loss)))
    assert compiled
    (loss, grads), (eager_loss, eager_grads) = results
    tolerance = 1e-2 if case.get("dtype") else 1e-5
    torch.testing.assert_close(loss, eager_loss, rtol=tolerance, atol=0)
    same_gradients(grads, eager_grads, tolerance)


def test_one_compilation_serves_all_layers_of_a_width(compiled):
    cfg = settings(depth=5, pred_depth=4)
    model = VJEPA.from_config(cfg)
    for seed in range(3):
        gradients(model, model(*make_batch(seed, cfg)).loss)
    # Before attention with and without a branch, and after it; for encoder, target encoder and predictor.
    assert len(compiled) == 9


def some_blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return make_blocks(3, 16, 2, 2.0, 0.0, False, True, compiled=True)


@pytest.mark.parametrize("place", ["attn.qkv", "mlp", "mlp.fc2"])
def test_a_block_that_somebody_looks_into_runs_eagerly(place, compiled):
    blocks, x = some_blocks(), torch.randn(7, 16, requires_grad=True)
    seen = []
    handle = blocks[1].get_submodule(place).register_forward_hook(lambda *args: seen.append(args))
    *_, (x_out, branch) = run_blocks(blocks, x, PACKING, None)
    assert len(seen) == 1 and len(compiled) == 3
    handle.remove()
    *_, (x_plain, branch_plain) = run_blocks(blocks, x, PACKING, None)
    assert len(seen) == 1
    torch.testing.assert_close(x_out + branch, x_plain + branch_plain)


def test_foreign_modules_inside_a_block_are_called(compiled):
    class Shifted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    blocks, x = some_blocks(), torch.randn(7, 16)
    plain = blocks[0](x, PACKING, None)
    shifted = Shifted(32, 16)
    shifted.load_state_dict(blocks[0].mlp.fc2.state_dict())
    blocks[0].mlp.fc2 = shifted
    torch.testing.assert_close(blocks[0](x, PACKING, None), plain + 1)


def test_a_single_token_or_none_is_no_variant_of_its_own(compiled):
    block = some_blocks()[0]
    for lengths in ((1,), (0,), (2,), (5, 4)):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        assert block(torch.randn(sum(lengths), 16), Packing(lengths, cu_seqlens), None).shape == (sum(lengths), 16)
    assert len(compiled) == 2


def test_no_compiler(compiled, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none_found() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(UserError, match="g\\+\\+.*model.compile_model=false"):
        some_blocks()[0](torch.randn(7, 16), PACKING, None)


@pytest.mark.slow
def test_steps_of_other_masks_compile_nothing_after_the_first_five(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_blocks, "_compiled", {})
    cfg = settings()
    torch.manual_seed(0)
    model = VJEPA.from_config(cfg)
    train_step = TrainStep(model, cfg)
    compilations: list[int] = []
    totals = set()

    def note(_: object) -> None:
        compilations.append(step)

    callback_handler.register_start_callback(note)
    try:
        for step in range(100):
            clips, masks = make_batch(step, cfg)
            totals.add((sum(masks.context_lengths), sum(masks.total_lengths)))
            if step % 20 == 0:
                compiled_loss = model(clips, masks).loss
                compiled_grads = gradients(model, compiled_loss)
                set_compiled(model, False)
                loss = model(clips, masks).loss
                torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
                same_gradients(compiled_grads, gradients(model, loss))
                set_compiled(model, True)
                model.zero_grad(set_to_none=True)
            train_step(step, clips, masks)
    finally:
        callback_handler.remove_start_callback(note)
    assert len(totals) > 50
    assert compilations and max(compilations) < 5
