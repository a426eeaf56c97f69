"""Prediction error by horizon and as surprise: errors by hand, scores by hand, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import vjepa_fast as vf
from tests.checkpoints import models
from tests.data.conftest import write_video
from vjepa_fast.checkpoints.open import open_checkpoint
from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import UserError
from vjepa_fast.data.decode.index import DecodeError
from vjepa_fast.evaluation import horizon, prediction, surprise
from vjepa_fast.evaluation.views import ClipRule
from vjepa_fast.inference.model import InferenceModel
from vjepa_fast.inference.videos import list_videos

RULE = ClipRule(8, 8.0, None, (64, 64))


def loaded(checkpoint: Path, seen: int | None = None) -> prediction.Prediction:
    return prediction.Prediction.of(*prediction.load_encoders(open_checkpoint(checkpoint), "float32", {}), 8, seen)


def test_errors_are_those_of_training(checkpoint: Path) -> None:
    """Student and predictor against teacher, layer-normed, as vf.VJEPA computes its loss; copies by hand."""
    clips = models.clips()
    pair = loaded(checkpoint)
    assert (pair.context.weights, pair.target.weights, pair.context_tubelets) == ("encoder", "target_encoder", 2)
    found = pair.errors(clips)
    assert all(value.shape == (2, 2, 16) for value in found.values())
    model = models.model()
    ids = torch.arange(64).expand(2, -1)
    with torch.no_grad():
        out = model(clips, vf.MaskBatch.from_meta([ids[:, :32]], [ids[:, 32:]], (4, 4, 4)))
        (wanted,), (guess,) = out.targets[0], out.predictions[0]
        assert torch.allclose(found["predicted"].flatten(1), (guess - wanted).abs().mean(-1), atol=1e-5)
        past = F.layer_norm(model.target_encoder(clips[:, :4]), (96,)).unflatten(1, (2, 16))
        for kind, copy in (("copied", past[:, 1]), ("averaged", past.mean(1))):
            expected = (copy.repeat(1, 2, 1) - wanted).abs().mean(-1)
            assert torch.allclose(found[kind].flatten(1), expected, atol=1e-5), kind


def test_a_model_that_has_diverged_is_told(checkpoint: Path) -> None:
    pair = loaded(checkpoint)
    next(pair.target.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="has diverged"):
        pair.errors(models.clips())


def test_levels_of_v21_are_compared_each() -> None:
    made = models.model(n_output_distillation=4, depth=4)
    context = InferenceModel(made.encoder, made.predictor)
    pair = prediction.Prediction(context, InferenceModel(made.target_encoder, None), 2)
    found = pair.errors(models.clips())
    ids = torch.arange(64).expand(2, -1)
    with torch.no_grad():
        out = made(models.clips(), vf.MaskBatch.from_meta([ids[:, :32]], [ids[:, 32:]], (4, 4, 4)))
    expected = (out.predictions[0][0] - out.targets[0][0]).abs().mean(-1)
    assert torch.allclose(found["predicted"].flatten(1), expected, atol=1e-5)


def test_windows(videos: Path, tmp_path: Path) -> None:
    assert prediction.window_starts(30, 24, 4) == [0, 4, 6]
    assert prediction.window_starts(24, 24, 4) == prediction.window_starts(22, 24, 4) == [0]
    source = list_videos([str(videos / "7.mp4")]).open(0)
    clips, numbers = prediction.read_windows(source, RULE, 2)
    # 40 frames, every third, windows of 24 source frames two clip frames apart.
    assert numbers[:, 0].tolist() == [0, 6, 12, 16] and clips.shape == (4, 8, 64, 64, 3)
    assert prediction.read_windows(source, RULE, None)[1][:, 0].tolist() == [8]
    short = write_video(tmp_path / "short.mp4", num_frames=10, preset="ultrafast")
    with pytest.raises(DecodeError, match="it has 10 frames, fewer than a window of 24"):
        prediction.read_windows(list_videos([str(short)]).open(0), RULE, None)


def test_horizon_scores() -> None:
    ones = torch.ones(1, 2, 3)
    errors = [
        {"predicted": 0.5 * ones, "copied": ones, "averaged": 2 * ones},
        {"predicted": 1.5 * ones, "copied": torch.tensor([1.0, 3.0])[None, :, None] * ones, "averaged": ones},
    ]
    found = horizon.horizon_scores(errors, 0.25)
    first, second = found["by_horizon"]
    assert (first["seconds"], second["seconds"]) == (0.25, 0.5)
    assert (first["predicted"], first["copied"], second["copied"]) == (1.0, 1.0, 2.0)
    assert (first["share_nearer"], second["share_nearer"]) == (0.5, 1.0)
    assert first["predicted_standard_error"] == pytest.approx(0.5)
    assert found["ratio"] == pytest.approx(1.0 / 1.5) and found["share_nearer"] == 1.0


def test_area_under_the_curve() -> None:
    labels = torch.tensor([True, True, False, False])
    assert surprise.area_under_curve(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 1.0
    assert surprise.area_under_curve(torch.tensor([4.0, 1.0, 2.0, 3.0]), labels) == 0.5
    assert surprise.area_under_curve(torch.tensor([2.0, 1.0, 2.0, 1.0]), labels) == 0.5
    assert surprise.roc(torch.tensor([4.0, 1.0, 2.0, 3.0]), labels) == ([0, 0, 0.5, 1, 1], [0, 0.5, 0.5, 0.5, 1])
    scores = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    which = torch.arange(60) < 30
    low, high = surprise.interval(scores, which)
    assert low < surprise.area_under_curve(scores, which) < high and 0.15 < high - low < 0.4


def test_pairs() -> None:
    labels = torch.tensor([False, True, True, False, False, False, False, True, True])
    scores = torch.tensor([1.0, 2.0, 1.0, 3.0, 9.0, 9.0, 4.0, 4.0, 0.0])
    assert surprise.paired_accuracy(scores, labels) == pytest.approx((1 + 0 + 0.5) / 3)
    assert surprise.paired_accuracy(scores[4:6], labels[4:6]) is None


def test_surprise_of_a_video() -> None:
    errors = torch.tensor([[[1.0, 3.0]], [[2.0, 8.0]]])
    found = surprise.surprise({"predicted": errors, "copied": errors / 2, "averaged": errors})
    assert found["predicted"] == {"mean window": 3.5, "worst window": 5.0, "worst token": 8.0}
    assert found["copied"]["worst window"] == 2.5


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["probe", *map(str, args)])


def test_horizon_command(checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--checkpoint", checkpoint, "--val", manifests[0], "--task", "horizon", "--context", 2, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    assert [row["seconds"] for row in found["scores"]["by_horizon"]] == [0.25, 0.5, 0.75]
    assert found["encoders"] == {"context": "encoder", "target": "target_encoder"}
    assert (out / "horizon.png").stat().st_size > 5000
    # The same by hand, of one video.
    source = list_videos([str(manifests[0])]).open(0)
    expected = loaded(checkpoint, 2).errors(prediction.read_windows(source, RULE, None)[0])
    alone = tmp_path / "alone.csv"
    alone.write_text(manifests[0].read_text().splitlines()[0])
    assert (
        run(
            "--checkpoint", checkpoint, "--val", alone, "--task", "horizon", "--context", 2, "--out", tmp_path / "alone"
        ).exit_code
        == 0
    )
    rows = json.loads((tmp_path / "alone" / "results.json").read_text())["scores"]["by_horizon"]
    assert [row["predicted"] for row in rows] == pytest.approx(expected["predicted"].mean((0, 2)).tolist(), rel=1e-5)


def test_surprise_command(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    val, out = tmp_path / "val.csv", tmp_path / "out"
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    val.write_text(f"{broken} 1\n" + "".join(f"{videos / f'{n}.mp4'} {n % 2}\n" for n in range(6)))
    result = run("--checkpoint", checkpoint, "--val", val, "--task", "surprise", "--out", out, "--pairs")
    assert result.exit_code == 0, result.output
    assert "1 of 7 videos were left out" in result.output and "pairs are left out" in result.output
    found = json.loads((out / "results.json").read_text())
    assert (found["scores"]["videos"], found["scores"]["anomalies"]) == (6, 3)
    scores = {path: one["predicted"]["worst window"] for path, one in found["by_video"].items()}
    labels = torch.tensor([one["label"] == 1 for one in found["by_video"].values()])
    auc = surprise.area_under_curve(torch.tensor(list(scores.values())).double(), labels)
    assert found["scores"]["auc"]["predicted"]["worst window"]["auc"] == pytest.approx(auc)
    assert (out / "surprise.png").exists()


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (("--task", "surprise"), "expected 0 (as it should be) or 1", 1),
        (("--task", "horizon", "--context", "3"), "--frames 8 with --context 3: expected multiples of 2", 2),
        (("--task", "horizon", "--context", "8"), "more frames than are seen", 2),
        (("--task", "horizon", "--frames", "64"), "none of the videos could be read", 1),
        ((), "--train is missing; expected labelled videos to fit probes on", 2),
    ],
)
def test_what_does_not_fit(
    checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path, args: tuple[str, ...], message: str, code: int
) -> None:
    result = run("--checkpoint", checkpoint, "--val", manifests[1], "--out", tmp_path / "out", *args)
    assert result.exit_code == code, result.output
    assert message in result.output


def test_a_video_with_two_labels(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    val = tmp_path / "val.csv"
    val.write_text(f"{videos}/6.mp4 0\n{videos}/7.mp4 1\n{videos}/6.mp4 1\n")
    result = run("--checkpoint", checkpoint, "--val", val, "--task", "surprise", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "6.mp4 is there twice, with label 0 and with 1" in result.output
    # Nothing is asked of labels here.
    assert run("--checkpoint", checkpoint, "--val", val, "--task", "horizon", "--out", tmp_path / "out").exit_code == 0


def test_a_file_without_predictor(manifests: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save({"target_encoder": models.contents(models.model())["target_encoder"]}, tmp_path / "encoder.pt")
    result = run(
        "--checkpoint",
        tmp_path / "encoder.pt",
        "--val",
        manifests[1],
        "--task",
        "horizon",
        "--set",
        "num_heads=3",
        "--out",
        tmp_path / "out",
    )
    assert result.exit_code == 1 and "has no predictor, which this task asks" in result.output
