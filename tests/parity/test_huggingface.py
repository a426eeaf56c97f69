"""transformers' VJEPA2Model beside ours, with random weights converted both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.checkpoints.huggingface import weights as huggingface
from vjepa_fast.common.errors import UserError
from vjepa_fast.config.schema import Config
from vjepa_fast.ops.patch_embed import normalise

from .cases import Case, make_batch, recipe_weights

NUM_MASK_TOKENS = 3
# Encoder heads of 64 are those of ViT-L and ViT-g, of 80 those of ViT-H; every predictor has heads of 32.
WIDTHS = {64: (128, 2), 80: (160, 2)}


def case_of(head_dim: int) -> Case:
    embed_dim, num_heads = WIDTHS[head_dim]
    return Case(
        f"hf{head_dim}", embed_dim=embed_dim, num_heads=num_heads, pred_embed_dim=96, pred_num_heads=3, batch_size=2
    )


def our_model(case: Case) -> vf.VJEPA:
    options = case.config()
    options["model"]["num_mask_tokens"] = NUM_MASK_TOKENS
    return vf.VJEPA.from_config(Config.model_validate(options)).eval()


def randomise(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Give every parameter of `module` non-trivial values and return the state."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    module.load_state_dict(recipe_weights(shapes, seed), strict=True)
    return module.state_dict()


def their_model(case: Case) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        patch_size=case.patch_size,
        crop_size=case.crop_size,
        frames_per_clip=max(case.frames),
        tubelet_size=case.tubelet_size,
        hidden_size=case.embed_dim,
        num_attention_heads=case.num_heads,
        num_hidden_layers=case.depth,
        pred_hidden_size=case.pred_embed_dim,
        pred_num_attention_heads=case.pred_num_heads,
        pred_num_hidden_layers=case.pred_depth,
        pred_num_mask_tokens=NUM_MASK_TOKENS,
        attn_implementation="sdpa",
    )
    return transformers.VJEPA2Model(config).eval()


def assert_same_features(case: Case, ours: vf.VJEPA, theirs: Any) -> None:
    """Encoder features of whole clips, and predictions from some of them."""
    batch = make_batch(case, 0)
    clip, context, target = batch.clips[0], batch.masks_enc[0][0], batch.masks_pred[0][0]
    with torch.no_grad():
        expected = theirs(
            normalise(clip, torch.float32).permute(0, 1, 4, 2, 3), context_mask=[context], target_mask=[target]
        )
        features = ours.encoder(clip)
        assert features.std() > 0.1
        assert (features - expected.last_hidden_state).abs().max().item() <= 1e-5
        seen = features.gather(1, context[..., None].expand(-1, -1, features.shape[-1]))
        # transformers always predicts with mask token 1.
        predictions = ours.predictor(seen, context, target, mask_index=1)
        assert predictions.std() > 0.1
        difference = predictions - expected.predictor_output.last_hidden_state
        assert difference.abs().max().item() <= 1e-5


@pytest.mark.parametrize("head_dim", WIDTHS)
def test_ours_runs_there(head_dim: int) -> None:
    case = case_of(head_dim)
    ours, theirs = our_model(case), their_model(case)
    state = huggingface.to_hf(randomise(ours.encoder, 1), randomise(ours.predictor, 2))
    theirs.load_state_dict(state, strict=True)
    assert_same_features(case, ours, theirs)


@pytest.mark.parametrize("head_dim", WIDTHS)
def test_theirs_runs_here(head_dim: int) -> None:
    case = case_of(head_dim)
    ours, theirs = our_model(case), their_model(case)
    encoder_state, predictor_state = huggingface.from_hf(randomise(theirs, 3))
    ours.encoder.load_state_dict(encoder_state, strict=True)
    ours.predictor.load_state_dict(predictor_state, strict=True)
    assert_same_features(case, ours, theirs)


def test_round_trip_is_exact() -> None:
    model = our_model(case_of(64))
    states = randomise(model.encoder, 4), randomise(model.predictor, 5)
    converted = huggingface.to_hf(*states)
    for before, after in zip(states, huggingface.from_hf(converted), strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value), key
    assert converted["predictor.embeddings.mask_tokens"].shape == (NUM_MASK_TOKENS, 1, 1, 96)
    # Separate storage: files of tensors that share memory cannot be written by safetensors.
    thirds = [converted[f"encoder.layer.0.attention.{name}.weight"] for name in ("query", "key", "value")]
    assert len({third.untyped_storage().data_ptr() for third in thirds}) == 3


@pytest.mark.parametrize(
    ("part", "key", "shape"),
    [
        (0, "pos_embed", (1, 64, 128)),
        (0, "blocks.0.mlp.fc3.weight", (128, 344)),
        (0, "patch_embed.proj.weight", (128, 3, 8, 8)),
        (1, "predictor_pos_embed", (1, 64, 96)),
    ],
)
def test_what_has_no_counterpart_is_refused(part: int, key: str, shape: tuple[int, ...]) -> None:
    model = our_model(case_of(64))
    states = model.encoder.state_dict(), model.predictor.state_dict()
    states[part][key] = torch.zeros(shape)
    with pytest.raises(UserError, match=rf"'{key}' of shape .* expected a video model with RoPE and GELU"):
        huggingface.to_hf(*states)


def test_a_foreign_or_incomplete_state_is_refused() -> None:
    model = our_model(case_of(64))
    state = huggingface.to_hf(model.encoder.state_dict(), model.predictor.state_dict())
    with pytest.raises(UserError, match=r"unexpected key 'pooler\.query_tokens'"):
        huggingface.from_hf({**state, "pooler.query_tokens": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected key 'encoder\.layer\.0\.attention\.gate\.weight'"):
        huggingface.from_hf({**state, "encoder.layer.0.attention.gate.weight": torch.zeros(1)})
    for missing in ("predictor.embeddings.mask_tokens", "encoder.layer.1.attention.key.bias"):
        with pytest.raises(UserError, match=missing):
            huggingface.from_hf({key: value for key, value in state.items() if key != missing})
