"""vf.load and what it returns."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import vjepa_fast as vf
from tests.checkpoints import models
from vjepa_fast.inference.model import CheckpointWarning, InferenceModel
from vjepa_fast.ops.patch_embed import normalise


@pytest.fixture(scope="module")
def made() -> vf.VJEPA:
    return models.model()


@pytest.fixture(scope="module")
def path(made: vf.VJEPA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "latest.pt"
    torch.save(models.contents(made), path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return vf.load(path, **models.NOT_IN_SHAPES)


def test_features_are_the_target_encoders_unless_asked_otherwise(made: vf.VJEPA, model: Any, path: Path) -> None:
    clips = models.clips()
    assert torch.equal(model.encode(clips), made.target_encoder(clips))
    student = vf.load(path, weights="encoder", **models.NOT_IN_SHAPES)
    assert torch.equal(student.encode(clips), made.encoder(clips))
    assert not model.encode(clips).requires_grad and not model.training


@pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")
def test_nothing_else_is_in_memory(path: Path) -> None:
    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, torch.Tensor)}
    model = vf.load(path, **models.NOT_IN_SHAPES)
    gc.collect()
    alive = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and id(one) not in before]
    own = {value.data_ptr() for value in model.state_dict().values()}
    assert {one.data_ptr() for one in alive} == own
    assert sum(one.numel() for one in model.parameters()) == sum(one.numel() for one in alive)
    assert vf.load(path, predictor=False, **models.NOT_IN_SHAPES).predictor is None


@pytest.mark.parametrize("layout", ["BTHWC", "BCTHW", "BTCHW"])
def test_layouts_agree(layout: str, model: Any) -> None:
    clips = models.clips()
    expected = model.encode(clips)
    order = {"BTHWC": (0, 1, 2, 3, 4), "BCTHW": (0, 4, 1, 2, 3), "BTCHW": (0, 1, 4, 2, 3)}[layout]
    assert torch.equal(model.encode(clips.permute(order)), expected)
    floats = normalise(clips, torch.float32).permute(order)
    assert (model.encode(floats) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("shape", "grid"), [((1, 5, 40, 70, 3), (3, 2, 4)), ((1, 1, 16, 16, 3), (1, 1, 1)), ((2, 12, 96, 32, 3), (6, 6, 2))]
)
def test_any_number_of_frames_and_any_size(
    shape: tuple[int, ...], grid: tuple[int, ...], made: vf.VJEPA, model: Any
) -> None:
    clips = models.clips(*shape)
    features = model.encode(clips)
    assert model.grid_of(clips) == grid and features.shape == (shape[0], grid[0] * grid[1] * grid[2], models.WIDTH)
    whole = clips[:, :, : grid[1] * 16, : grid[2] * 16]
    whole = torch.cat([whole, whole[:, -1:]], 1) if shape[1] % 2 else whole
    assert torch.equal(features, made.target_encoder(whole))


def test_images(model: Any) -> None:
    image = models.clips(48, 64, 3)
    expected = model.encode(image[None, None])
    for given in (image, image.permute(2, 0, 1), image[None], image.permute(2, 0, 1)[None]):
        assert torch.equal(model.encode(given), expected)


def test_layers_and_pooling(made: vf.VJEPA, model: Any) -> None:
    clips = models.clips()
    last, first = model.encode(clips, out_layers=[-1, 0])
    assert torch.equal(last, model.encode(clips)) and not torch.allclose(first, last)
    assert torch.equal(model.encode(clips, pool="mean"), last.mean(1))
    assert [one.shape for one in model.encode(clips, out_layers=[1], pool="mean")] == [(2, models.WIDTH)]
    for wrong in ([3], [-4], []):
        with pytest.raises(ValueError, match="blocks 0 to 2"):
            model.encode(clips, out_layers=wrong)
    with pytest.raises(ValueError, match="pool is 'max'"):
        model.encode(clips, pool="max")
    # A failed or layered call leaves nothing behind.
    assert torch.equal(model.encode(clips), last)


def test_predictions_are_those_of_training(made: vf.VJEPA, path: Path) -> None:
    clips, positions = models.clips(), torch.tensor([3, 17, 40])
    model = vf.load(path, weights="encoder", **models.NOT_IN_SHAPES)
    rest = torch.tensor([one for one in range(64) if one not in positions.tolist()])
    masks = vf.MaskBatch.from_meta([rest.expand(2, -1)], [positions.expand(2, -1)], (4, 4, 4))
    expected = made(clips, masks).predictions[0][0]
    for given in (positions, positions.expand(2, -1)):
        assert (model.predict(clips, given) - expected).abs().max() <= 1e-6
    dense = torch.zeros(64, dtype=torch.bool)
    dense[positions] = True
    assert (model.predict(clips, dense.view(4, 4, 4)) - expected).abs().max() <= 1e-6
    assert (model.predict(clips, positions, context=rest) - expected).abs().max() <= 1e-6
    assert not torch.allclose(model.predict(clips, positions, mask_token=1), expected)
    assert not torch.allclose(model.predict(clips, positions, context=rest[:20]), expected)


def test_the_future_is_what_the_predictor_says_behind_the_clip(made: vf.VJEPA, path: Path) -> None:
    clips = models.clips(2, 6, 64, 64, 3)
    model = vf.load(path, weights="encoder", **models.NOT_IN_SHAPES)
    found = model.predict_future(clips, num_frames=3)
    assert found.shape == (2, 2 * 16, models.WIDTH)
    whole = torch.cat([clips, clips[:, :4]], 1)
    expected = model.predict(whole, torch.arange(48, 80), context=torch.arange(48))
    assert (found - expected).abs().max() <= 1e-6
    assert model.predict_future(clips[:, :, :32], 1).shape == (2, 8, models.WIDTH)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, path: Path, model: Any) -> None:
    clips = models.clips()
    half = vf.load(path, dtype=dtype, **models.NOT_IN_SHAPES)
    wanted = getattr(torch, dtype)
    assert {one.dtype for one in half.parameters()} == {wanted}
    for given in (clips, normalise(clips, torch.float32), normalise(clips, wanted)):
        features = half.encode(given)
        assert features.dtype == wanted
        assert (features.float() - model.encode(clips)).norm() / model.encode(clips).norm() < 0.03
    exact = model.predict(clips, torch.tensor([1, 9]))
    assert (half.predict(clips, torch.tensor([1, 9])).float() - exact).norm() / exact.norm() < 0.05
    assert half.predict_future(clips, 2).dtype == wanted


def test_wrong_input_is_named(model: Any) -> None:
    for clips, said in (
        (torch.zeros(2, 8, 64, 64, 3, dtype=torch.int64), "dtype torch.int64; expected uint8"),
        (torch.zeros(2, 8, 64, 64, 4), r"shape \[2, 8, 64, 64, 4\]; expected"),
        (torch.zeros(2, 8, 8, 64, 3), "at least one frame of at least 16 x 16"),
        ([1, 2], "are a list; expected a torch.Tensor"),
    ):
        with pytest.raises(ValueError, match=said):
            model.encode(clips)
    with pytest.warns(CheckpointWarning, match="negative.*uint8"):
        InferenceModel(model.encoder, None).encode(torch.rand(1, 2, 32, 32, 3))
    clips = models.clips()
    for positions, said in (
        (torch.arange(64), "nothing is left to predict from"),
        (torch.tensor([64]), "tokens 0 to 63"),
        (torch.zeros(4, 4, dtype=torch.bool), r"expected \[4, 4, 4\]"),
        (torch.tensor([0.5]), "expected token ids"),
        (torch.tensor([[1, 1], [1, 2]]), "twice"),
    ):
        with pytest.raises(ValueError, match=said):
            model.predict(clips, positions)
    with pytest.raises(ValueError, match="num_frames is 0"):
        model.predict_future(clips, 0)


def test_sincos_predictor_cannot_look_past_its_table(tmp_path: Path) -> None:
    made = models.model(use_rope=False)
    torch.save(models.contents(made), tmp_path / "c.pt")
    model = vf.load(tmp_path / "c.pt", **models.NOT_IN_SHAPES)
    assert torch.equal(model.encode(models.clips()), made.target_encoder(models.clips()))
    assert model.predict_future(models.clips(1, 4, 64, 64, 3), 4).shape == (1, 32, models.WIDTH)
    with pytest.raises(ValueError, match=r"\b8 frames.*\b2 predicted.*\b8\b.*predictor"):
        model.predict_future(models.clips(), 2)


def test_exported_encoder(model: Any, tmp_path: Path) -> None:
    clips = models.clips(1, 4, 32, 32, 3)
    torch.export.save(torch.export.export(model.encoder, (clips,)), tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    assert (loaded(clips) - model.encode(clips)).abs().max() <= 1e-6


def test_onnx_of_the_encoder(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the exported encoder")
    clips = models.clips(1, 4, 32, 32, 3)
    torch.onnx.export(model.encoder, (clips,), tmp_path / "encoder.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "encoder.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
    assert (torch.from_numpy(found) - model.encode(clips)).abs().max() <= 1e-4
