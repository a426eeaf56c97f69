"""`vjepa-fast convert`: every pair of layouts, proved by the other library where it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vjepa_fast as vf
from tests.checkpoints import models
from vjepa_fast.checkpoints import export
from vjepa_fast.checkpoints.open import open_checkpoint
from vjepa_fast.cli.main import app
from vjepa_fast.inference import verify

FIELDS = ["num_heads=3", "pred_num_heads=3", f"crop_size={models.CROP}", "num_frames=8"]


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, args)])


def convert(*args: Any) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return str(result.output)


@pytest.fixture(scope="module")
def made() -> vf.VJEPA:
    return models.model()


@pytest.fixture(scope="module")
def meta_file(made: vf.VJEPA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("meta") / "latest.pt"
    torch.save(models.contents(made), path)
    return path


@pytest.fixture(scope="module")
def probe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "ssv2.pt"
    torch.save(
        {
            "classifiers": [
                models.prefixed(models.probe().state_dict(), "module."),
                models.prefixed(models.probe(7).state_dict(), "module."),
            ],
            "epoch": 1,
        },
        path,
    )
    return path


def equal(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor] | None) -> bool:
    assert a is not None and b is not None
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("first", ["meta", "hf", "fast"])
@pytest.mark.parametrize("second", ["meta", "hf", "fast"])
def test_every_pair(first: str, second: str, made: vf.VJEPA, meta_file: Path, tmp_path: Path) -> None:
    names = {"meta": "a.pt", "hf": "a_hf", "fast": "a_fast"}
    one, two = tmp_path / names[first], tmp_path / "two" / names[second]
    text = convert(meta_file, one, *FIELDS, "--to", first)
    assert "encoder, predictor equal to the bit" in text
    text = convert(one, two, "--to", second)
    assert ("in transformers, relative difference: encoder " in text) == (second == "hf")
    found = open_checkpoint(two)
    assert equal(found.encoders[found.choose()], made.target_encoder.state_dict())
    assert equal(found.predictor, made.predictor.state_dict())
    # Nobody had to say again what shapes do not tell.
    model = vf.load(two)
    assert model.cfg.num_heads == 3 and model.cfg.pred_num_heads == 3 and model.cfg.num_frames == 8
    assert torch.equal(model.encode(models.clips()), made.target_encoder(models.clips()))


def test_student_and_teacher_are_both_kept_in_metas_layout(made: vf.VJEPA, meta_file: Path, tmp_path: Path) -> None:
    convert(meta_file, tmp_path / "both.pt", *FIELDS, "--to", "meta")
    found = open_checkpoint(tmp_path / "both.pt").encoders
    assert equal(found["encoder"], made.encoder.state_dict())
    assert equal(found["target_encoder"], made.target_encoder.state_dict())
    convert(meta_file, tmp_path / "one.pt", *FIELDS, "--to", "meta", "--weights", "encoder")
    found = open_checkpoint(tmp_path / "one.pt").encoders
    assert equal(found["target_encoder"], made.encoder.state_dict())
    # The same memory twice is written once.
    assert (tmp_path / "one.pt").stat().st_size < 0.7 * (tmp_path / "both.pt").stat().st_size


def test_probe_becomes_a_classifier_of_transformers_and_comes_back(
    meta_file: Path, probe_file: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    text = convert(
        meta_file, tmp_path / "hf", *FIELDS, "--to", "hf", "--probe", probe_file, "--classifier", 1, "--probe-heads", 3
    )
    assert "relative difference: classifier" in text
    theirs = transformers.VJEPA2ForVideoClassification.from_pretrained(tmp_path / "hf")
    assert theirs.config.num_labels == 7
    convert(tmp_path / "hf", tmp_path / "back.pt", "--to", "meta")
    found = open_checkpoint(tmp_path / "back.pt")
    assert equal(found.classifiers[0], models.probe(7).state_dict()) and found.probe_heads == 3
    contents = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(key.startswith("module.") for key in contents["classifiers"][0])
    # Our own file keeps all of them.
    convert(meta_file, tmp_path / "all.safetensors", *FIELDS, "--to", "fast", "--probe", probe_file)
    assert len(open_checkpoint(tmp_path / "all.safetensors").classifiers) == 2


def test_a_probe_that_transformers_would_run_otherwise_is_refused(
    meta_file: Path, probe_file: Path, tmp_path: Path
) -> None:
    result = run(meta_file, tmp_path / "hf", *FIELDS, "--to", "hf", "--probe", probe_file, "--classifier", 0)
    assert result.exit_code == 1 and "the encoder's 3 heads, but this one has 16" in result.output
    result = run(meta_file, tmp_path / "hf", *FIELDS, "--to", "hf", "--probe", probe_file)
    assert result.exit_code == 2 and "choose it with --classifier 0 to 1" in result.output
    result = run(meta_file, tmp_path / "hf", *FIELDS, "--to", "hf", "--probe", meta_file)
    assert result.exit_code == 1 and "holds no attentive probe" in result.output
    wide = {"pooler.query_tokens": torch.zeros(1, 1, 64), "linear.bias": torch.zeros(2)}
    torch.save({"classifiers": [wide]}, probe_file.with_name("wide.pt"))
    result = run(meta_file, tmp_path / "m.pt", *FIELDS, "--to", "meta", "--probe", probe_file.with_name("wide.pt"))
    assert result.exit_code == 1 and "the attentive probe has width 64, the encoder 96" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rope": False}, "sine-cosine or learned positions"),
        ({"use_silu": True}, "SwiGLU"),
        ({"rope_style": "interleaved"}, "RoPE as in V-JEPA 2.1"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save(models.contents(models.model(**changes)), tmp_path / "latest.pt")
    style = [f"{key}={value}" for key, value in changes.items() if key == "rope_style"]
    result = run(tmp_path / "latest.pt", tmp_path / "hf", *FIELDS, *style, "--to", "hf")
    assert result.exit_code == 1 and "Hugging Face's V-JEPA 2 cannot hold this model" in result.output
    assert said in result.output and not (tmp_path / "hf").exists()
    # The other layouts take it.
    convert(tmp_path / "latest.pt", tmp_path / "f", *FIELDS, *style, "--to", "fast")
    convert(tmp_path / "f", tmp_path / "m.pt", "--to", "meta")
    for key, value in changes.items():
        assert getattr(vf.load(tmp_path / "m.pt").cfg, key) == value


def test_action_conditioned_predictor_survives(made: vf.VJEPA, tmp_path: Path) -> None:
    contents = models.contents(made, "module.")
    action = {"module.action_encoder.weight": torch.ones(48, 7), "module.predictor_embed.weight": torch.ones(48, 96)}
    torch.save(contents | {"predictor": action}, tmp_path / "ac.pt")
    text = convert(tmp_path / "ac.pt", tmp_path / "ac.safetensors", *FIELDS, "--to", "fast")
    assert "cannot be run yet" in text
    convert(tmp_path / "ac.safetensors", tmp_path / "back.pt", "--to", "meta")
    assert equal(torch.load(tmp_path / "back.pt", weights_only=True)["predictor"], action)
    assert "left out" in convert(tmp_path / "ac.pt", tmp_path / "hf", *FIELDS, "--to", "hf")


def test_encoder_alone(made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(made.encoder.state_dict(), tmp_path / "bare.pt")
    fields = [one for one in FIELDS if "pred" not in one]
    text = convert(tmp_path / "bare.pt", tmp_path / "hf", *fields, "--to", "hf")
    assert "there is no predictor to write" in text and "relative difference: encoder" in text
    # The predictor that transformers makes up has sizes of its own, whatever the encoder's heads are.
    assert "pred_num_attention_heads" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    convert(tmp_path / "bare.pt", tmp_path / "m.pt", *fields, "--to", "meta")
    assert "predictor" not in torch.load(tmp_path / "m.pt", weights_only=True)


def test_sharded_folder(meta_file: Path, made: vf.VJEPA, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(meta_file, tmp_path / "hf", *FIELDS, "--to", "hf", "--no-check")
    model = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert equal(open_checkpoint(tmp_path / "shards").predictor, made.predictor.state_dict())
    next(iter((tmp_path / "shards").glob("*.safetensors"))).unlink()
    result = run(tmp_path / "shards", tmp_path / "x.pt", "--to", "meta")
    assert result.exit_code == 1 and "has config.json but no model-" in result.output


def test_nothing_is_overwritten_and_nothing_is_left_behind(
    meta_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.pt").write_text("mine")
    result = run(meta_file, tmp_path / "there.pt", *FIELDS, "--to", "meta")
    assert result.exit_code == 2 and "exists; give another name" in result.output
    assert (tmp_path / "there.pt").read_text() == "mine"

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fails)
    for name, layout in (("a_hf", "hf"), ("a.safetensors", "fast")):
        result = run(meta_file, tmp_path / name, *FIELDS, "--to", layout)
        assert result.exit_code == 1 and "the disk is full" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]


def test_usage(meta_file: Path, tmp_path: Path) -> None:
    for args, said in (
        (("--to", "onnx"), "'onnx' is not one of"),
        (("--to", "meta", "--weights", "teacher"), "has no teacher; it has"),
        (("--to", "meta", "heads=3"), "heads is not a field of the model's config; did you mean num_heads?"),
        (("--to", "meta", "num_heads"), "unexpected argument 'num_heads'"),
        (("--to", "hf", "--reference", "."), "--reference runs Meta's modules"),
    ):
        result = run(meta_file, tmp_path / "x", *args)
        assert result.exit_code == 2 and said in result.output, result.output
    result = run(tmp_path / "gone.pt", tmp_path / "x", "--to", "hf")
    assert result.exit_code == 1 and "gone.pt does not exist" in result.output


def test_difference_fails(meta_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "against_hf", lambda folder: {"encoder": 0.5})
    result = run(meta_file, tmp_path / "hf", *FIELDS, "--to", "hf")
    assert result.exit_code == 1 and "the outputs differ by 5.0e-01" in result.output


REFERENCES = {"v1": "VJEPA1_REFERENCE", "v2": "VJEPA2_REFERENCE"}


@pytest.mark.parametrize("version", REFERENCES)
def test_run_by_metas_modules(version: str, probe_file: Path, tmp_path: Path) -> None:
    root = os.environ.get(REFERENCES[version])
    if not root:
        pytest.skip(f"{REFERENCES[version]} does not name a checkout of the reference")
    made = models.model(use_rope=version == "v2")
    torch.save(models.contents(made), tmp_path / "latest.pt")
    text = convert(
        tmp_path / "latest.pt",
        tmp_path / "m.pt",
        *FIELDS,
        "--to",
        "meta",
        "--reference",
        root,
        *(("--probe", probe_file) if version == "v2" else ()),
    )
    assert "relative difference: encoder" in text and "predictor" in text
    assert ("classifier 1" in text) == (version == "v2")


def test_process_and_exit_code(meta_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vjepa_fast", "convert", str(meta_file), str(tmp_path / "hf"), *FIELDS]
    done = subprocess.run([*command, "--to", "hf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "in transformers" in done.stdout
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == models.WIDTH
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o666 & ~umask}
