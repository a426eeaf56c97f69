"""The encoder as a plain module."""

import pytest
import torch

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import Config
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.layers import drop_path_scale
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.ops.packing import Packing


def model_config(crop=32, frames=8, **keys):
    keys = {
        "model_name": "vit_tiny",
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 2,
        "pred_embed_dim": 24,
        "pred_depth": 2,
        "pred_num_heads": 2,
    } | keys
    return Config.model_validate(
        {"model": keys, "data": {"crop_size": crop, "patch_size": 8, "dataset_fpcs": [frames]}}
    ).model


def test_layouts_of_the_same_clip_give_the_same_features():
    encoder = VisionTransformer(model_config())
    pixels = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    expected = encoder(pixels)
    assert expected.shape == (2, 4 * 4 * 4, 48)
    torch.testing.assert_close(encoder(pixels.movedim(-1, 1)), expected)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(encoder((pixels / 255 - mean) / std), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_rope", [True, False])
def test_other_sizes_and_frame_counts(use_rope):
    encoder = VisionTransformer(model_config(use_rope=use_rope))
    for frames, height, width in ((4, 32, 32), (16, 32, 32), (8, 48, 32), (2, 24, 56)):
        out = encoder(torch.randint(0, 256, (1, frames, height, width, 3), dtype=torch.uint8))
        assert out.shape == (1, frames * height * width // 128, 48)


def test_clips_of_several_sizes_in_one_pass():
    encoder = VisionTransformer(model_config())
    clips = [torch.randint(0, 256, (1, 4, *sides, 3), dtype=torch.uint8) for sides in ((32, 48), (40, 24))]
    packed, _ = encoder.forward_packed(clips)
    torch.testing.assert_close(packed, torch.cat([encoder(clip)[0] for clip in clips]), atol=1e-5, rtol=1e-4)


def test_rope_precision_matters_to_half_precision_only():
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (1, 8, 32, 32, 3), dtype=torch.uint8)
    ids = torch.arange(64)[None]
    for dtype in ("float32", "bfloat16"):
        cfg = model_config().model_copy(update={"dtype": dtype})
        encoder, predictor = VisionTransformer(cfg), Predictor(cfg)
        for block in (*encoder.blocks, *predictor.predictor_blocks):
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
        exact = encoder(clips)
        predicted = predictor(exact[:, :32], ids[:, :32], ids[:, 32:])
        encoder.cfg = predictor.cfg = cfg.model_copy(update={"rope_precision": "reference"})
        assert torch.equal(encoder(clips), exact) == (dtype == "float32")
        assert torch.equal(predictor(exact[:, :32], ids[:, :32], ids[:, 32:]), predicted) == (dtype == "float32")


def test_an_image_is_a_still_tubelet_to_a_video_model():
    encoder = VisionTransformer(model_config())
    image = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(encoder(image), encoder(image[:, None].repeat(1, 2, 1, 1, 1)))


def test_an_image_model_has_a_2d_patch_embedding():
    encoder = VisionTransformer(model_config(frames=1, use_rope=False))
    assert encoder.patch_embed.proj.weight.shape == (48, 3, 8, 8)
    assert encoder(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)).shape == (2, 16, 48)


def test_out_layers():
    encoder = VisionTransformer(model_config(), out_layers=[0, 2])
    first, last = encoder(torch.randint(0, 256, (1, 8, 32, 32, 3), dtype=torch.uint8))
    assert first.shape == last.shape == (1, 64, 48) and not torch.equal(first, last)
    plain = VisionTransformer(model_config())
    plain.load_state_dict(encoder.state_dict())
    x = torch.randint(0, 256, (1, 8, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(plain(x), encoder(x)[1])


def test_drop_path_drops_whole_sequences_and_keeps_the_mean():
    torch.manual_seed(0)
    packing = Packing.uniform(4000, 2, torch.device("cpu"))
    out = drop_path_scale(packing, 0.25, 8000, torch.ones(())).view(4000, 2)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == out[:, :1]).all()
    assert out.mean() == pytest.approx(1, abs=0.03)


def test_drop_path_acts_in_training_only():
    encoder = VisionTransformer(model_config(drop_path_rate=0.5))
    x = torch.randint(0, 256, (4, 8, 32, 32, 3), dtype=torch.uint8)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_non_square_predictor_tells_rows_from_columns():
    """On a 2 x 6 grid, token 6 is in row 1: a square reading of the ids would give other positions."""
    cfg = model_config(crop=(16, 48), frames=2)
    torch.manual_seed(0)
    predictor = Predictor(cfg).double()
    for block in predictor.predictor_blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    context = torch.randn(1, 2, 48, dtype=torch.float64)

    def predict(a, b, t):
        return predictor(context, torch.tensor([[a, b]]), torch.tensor([[t]]))

    # Attention sees relative positions (interleaved rotation): moving everything by one column changes nothing.
    cfg_rotation = cfg.model_copy(update={"rope_style": "interleaved"})
    predictor.cfg = cfg_rotation
    torch.testing.assert_close(predict(0, 1, 7), predict(3, 4, 10))
    assert not torch.allclose(predict(0, 1, 7), predict(4, 5, 7))


@pytest.mark.parametrize(
    "keys, message", [({"embed_dim": 50, "num_heads": 4}, "num_heads"), ({"pred_embed_dim": 25}, "pred_num_heads")]
)
def test_sizes_that_do_not_fit(keys, message):
    with pytest.raises(ConfigError, match=message):
        VJEPA(model_config(**keys))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 8, 32, 32, 4), "expected"),
        ((1, 7, 32, 32, 3), "frames 7"),
        ((1, 8, 33, 32, 3), "height 33"),
        ((1, 0, 32, 32, 3), "frames 0"),
        ((8, 32), "expected"),
    ],
)
def test_clips_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(model_config())(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"embed_dim": 8, "num_heads": 2}, "at least 6"),
        ({"use_rope": False, "embed_dim": 36, "num_heads": 2}, "multiple of 8"),
    ],
)
def test_widths_that_positions_cannot_fill(keys, message):
    with pytest.raises(ConfigError, match=message):
        VJEPA(model_config(**keys))


def test_out_layers_must_exist():
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        VisionTransformer(model_config(), out_layers=[3])


@pytest.mark.parametrize("kind", ["vjepa2", "vjepa1", "xavier", "xavier_uniform", "xavier_normal"])
def test_how_weights_begin(kind):
    """The last block's projection tells what is divided; V-JEPA 2.1's options are of the encoder alone."""
    torch.manual_seed(0)
    cfg = model_config(init=kind)
    divided = 1.0 if kind in ("vjepa1", "xavier") else 6**-0.5
    spread = VisionTransformer(cfg).blocks[2].attn.proj.weight.std().item()
    assert spread == pytest.approx((48**-0.5 if kind.startswith("xavier") else 0.02) * divided, rel=0.06)
    divided = 1.0 if kind in ("vjepa1", "xavier") else 4**-0.5
    spread = Predictor(cfg).predictor_blocks[1].attn.proj.weight.std().item()
    assert spread == pytest.approx((24**-0.5 if kind == "xavier" else 0.02) * divided, rel=0.1)
