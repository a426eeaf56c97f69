"""Meta's evaluation files as settings of `vjepa-fast probe`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.evaluation.attentive_probe import HeadSetting
from vjepa_fast.evaluation.eval_yaml import read_eval_yaml

V2 = """
eval_name: video_classification_frozen
nodes: 2
tasks_per_node: 4
experiment:
  classifier: {num_heads: 16, num_probe_blocks: 2}
  data: {frame_step: 2, frames_per_clip: 4, num_classes: 2, num_segments: 2, num_views_per_segment: 3, resolution: 32}
  optimization:
    batch_size: 1
    num_epochs: 2
    use_bfloat16: true
    multihead_kwargs:
    - {lr: 0.005, start_lr: 0.001, final_lr: 0.0, warmup: 1.0, weight_decay: 0.01, final_weight_decay: 0.1}
    - {lr: 0.001, weight_decay: 0.8}
model_kwargs:
  checkpoint: /your_vjepa2_checkpoints/vitl.pt
  pretrain_kwargs: {encoder: {checkpoint_key: encoder}}
  wrapper_kwargs: {max_frames: 128, use_pos_embed: false, out_layers: [1, 2]}
"""
V1 = """
nodes: 8
tasks_per_node: 8
data: {frame_step: 7, frames_per_clip: 16, num_segments: 8, num_views_per_segment: 3}
optimization: {attend_across_segments: true, num_epochs: 20, resolution: 224, batch_size: 4, weight_decay: 0.01,
  lr: 0.001, start_lr: 0.001, final_lr: 0.0, warmup: 0.}
pretrain: {clip_duration: null, checkpoint_key: target_encoder}
"""


def written(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "eval.yaml"
    path.write_text(text)
    return path


def test_v2(tmp_path: Path) -> None:
    found = read_eval_yaml(written(V2, tmp_path))
    assert found.options == {
        "frames": 4,
        "segments": 2,
        "views": 3,
        "frame_step": 2,
        "size": 32,
        "depth": 2,
        "probe_heads": 16,
        "epochs": 2,
        "batch_size": 8,
        "style": "vjepa2",
        "out_layers": "1,2",
        "weights": "encoder",
    }
    assert found.heads == [HeadSetting(0.005, 0.01, 0.001, 0.0, 0.1, 1.0), HeadSetting(0.001, 0.8, 0.001, 0.0, 0.8)]
    assert "1 videos on each of 8 GPUs are a step of 8 here" in found.notes[0]


def test_v1(tmp_path: Path) -> None:
    found = read_eval_yaml(written(V1, tmp_path))
    # The reference reads frame_step where its files do not have it.
    assert found.options == {
        "frames": 16,
        "segments": 8,
        "views": 3,
        "frame_step": 4,
        "size": 224,
        "depth": 1,
        "epochs": 20,
        "batch_size": 256,
        "style": "vjepa1",
        "weights": "target_encoder",
    }
    assert found.heads == [HeadSetting(0.001, 0.01, 0.001, 0.0, 1e-6)]


@pytest.mark.parametrize("variable", ["VJEPA1_REFERENCE", "VJEPA2_REFERENCE"])
def test_their_own_files(variable: str) -> None:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a checkout")
    folder = Path(os.environ[variable]) / "configs"
    read = 0
    for path in sorted(
        [
            *folder.glob("eval*/**/*k400*.yaml"),
            *folder.glob("eval*/**/*ssv2*.yaml"),
            *folder.glob("eval/**/*diving48.yaml"),
            *folder.glob("eval/**/*jester.yaml"),
            *folder.glob("eval/**/*coin.yaml"),
        ]
    ):
        found = read_eval_yaml(path)
        assert found.options["epochs"] in (20, 100) and found.options["views"] == 3, path
        assert len(found.heads) in ((1,) if variable == "VJEPA1_REFERENCE" else range(3, 21)), path
        read += 1
    assert read >= 6


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (V2, ("video_classification_frozen", "image_classification_frozen"), "is of image_classification_frozen"),
        (V2, ("use_pos_embed: false", "use_pos_embed: true"), "(positions of segments) is not supported; take it out"),
        (V2, ("num_epochs: 2", "num_epochs: many"), "num_epochs is 'many'; expected a positive whole number"),
        (V2, ("multihead_kwargs", "heads"), "multihead_kwargs is missing"),
        (V1, ("pretrain:", "model:"), "has neither experiment (V-JEPA 2) nor pretrain (V-JEPA 1)"),
        (
            V1,
            ("attend_across_segments: true", "attend_across_segments: false"),
            "(segments one by one) is not supported",
        ),
    ],
)
def test_what_is_not_there_is_said(text: str, change: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_eval_yaml(written(text.replace(*change), tmp_path))
    assert message in str(caught.value)


def test_the_command_follows_the_file(checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path) -> None:
    args = [
        "probe",
        "--checkpoint",
        str(checkpoint),
        "--train",
        str(manifests[0]),
        "--val",
        str(manifests[1]),
        "--out",
        str(tmp_path / "out"),
        "--eval-config",
        str(written(V2, tmp_path)),
        "--segments",
        "1",
        "--probe",
        "attentive",
    ]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    # The command line counts more.
    assert found["clips"] == {
        "frames": 4,
        "fps": None,
        "frame_step": 2,
        "size": [32, 32],
        "segments": 1,
        "views": 3,
        "layers": [1, 2],
    }
    assert found["weights"] == "encoder"
    own = found["probes"]["attentive"]
    assert (own["depth"], own["epochs"], own["batch_size"]) == (2, 2, 8)
    assert [(head["lr"], head["weight_decay"]) for head in own["heads"]] == [(0.005, 0.01), (0.001, 0.8)]
    result = CliRunner().invoke(app, [*args[:-6], "--out", str(tmp_path / "b"), "--out-layers", "1,7"])
    assert result.exit_code == 2 and "the encoder has blocks 0 to 2" in result.output
