"""Every layout in which V-JEPA weights lie is opened, and what is no such file is refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import vjepa_fast as vf
from tests.checkpoints import models
from vjepa_fast.checkpoints.open import open_checkpoint
from vjepa_fast.common.errors import ConfigError, UserError

PREFIXES = ["module.backbone.", "module.", "backbone.", "_orig_mod.module.backbone.", ""]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def made() -> vf.VJEPA:
    return models.model()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_training_checkpoint_with_any_prefix(prefix: str, made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(models.contents(made, prefix), tmp_path / "latest.pth.tar")
    found = open_checkpoint(tmp_path / "latest.pth.tar")
    assert found.layout == "meta" and list(found.encoders) == ["target_encoder", "encoder"]
    assert same(found.encoders["encoder"], made.encoder.state_dict())
    assert same(found.encoders["target_encoder"], made.target_encoder.state_dict())
    assert found.predictor is not None and same(found.predictor, made.predictor.state_dict())
    # The teacher, unless something else is asked for.
    assert found.choose() == "target_encoder" and found.choose("encoder") == "encoder"
    with pytest.raises(ConfigError, match=r"no ema_encoder.*target_encoder, encoder"):
        found.choose("ema_encoder")


def test_files_of_old_torch_are_read_too(made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(models.contents(made), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(open_checkpoint(tmp_path / "old.pt").encoders["encoder"], made.encoder.state_dict())


def test_distilled_release(made: vf.VJEPA, tmp_path: Path) -> None:
    state = models.prefixed(made.target_encoder.state_dict())
    torch.save({"ema_encoder": state, "encoder": models.prefixed(made.encoder.state_dict())}, tmp_path / "b.pt")
    found = open_checkpoint(tmp_path / "b.pt")
    assert found.choose() == "ema_encoder" and same(found.encoders["ema_encoder"], made.target_encoder.state_dict())
    assert found.predictor is None


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
def test_bare_state_dict_of_an_encoder(prefix: str, made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(models.prefixed(made.encoder.state_dict(), prefix), tmp_path / "bare.pt")
    found = open_checkpoint(tmp_path / "bare.pt")
    assert found.choose() == "encoder" and same(found.encoders["encoder"], made.encoder.state_dict())


def test_bare_state_dict_of_a_whole_model(made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(made.state_dict(), tmp_path / "bare.pt")
    found = open_checkpoint(tmp_path / "bare.pt")
    assert same(found.encoders["target_encoder"], made.target_encoder.state_dict())
    assert found.predictor is not None and same(found.predictor, made.predictor.state_dict())


def test_action_conditioned_predictor_is_recognised(made: vf.VJEPA, tmp_path: Path) -> None:
    contents = models.contents(made, "module.")
    contents["predictor"] |= {"module.action_encoder.weight": torch.zeros(48, 7)}
    torch.save(contents, tmp_path / "ac.pt")
    found = open_checkpoint(tmp_path / "ac.pt")
    assert found.predictor is None and found.action_predictor is not None
    assert "action_encoder.weight" in found.action_predictor
    with pytest.warns(UserWarning, match="action-conditioned predictor"):
        model = vf.load(tmp_path / "ac.pt", **models.NOT_IN_SHAPES)
    with pytest.raises(UserError, match="no predictor"):
        model.predict(models.clips(), torch.tensor([1]))


@pytest.mark.parametrize("key", ["classifiers", "classifier"])
def test_probes(key: str, tmp_path: Path) -> None:
    state = models.prefixed(models.probe().state_dict(), "module.")
    torch.save({key: [state, state] if key == "classifiers" else state, "epoch": 2}, tmp_path / "probe.pt")
    found = open_checkpoint(tmp_path / "probe.pt")
    assert len(found.classifiers) == (2 if key == "classifiers" else 1)
    assert same(found.classifiers[0], models.probe().state_dict())
    with pytest.raises(UserError, match="probes.*no encoder"):
        vf.load(tmp_path / "probe.pt")


def test_our_run_folder_says_its_config(made: vf.VJEPA, tmp_path: Path) -> None:
    contents = models.contents(made) | {"vjepa_fast": {"config": models.config().model_dump(mode="json")}}
    torch.save(contents, tmp_path / "latest.pt")
    model = vf.load(tmp_path)
    assert model.cfg.num_heads == models.HEADS and model.cfg.crop_size == (models.CROP, models.CROP)
    assert model.data["fps"] == 8 and model.assumed == []
    assert torch.equal(model.encode(models.clips()), made.target_encoder(models.clips()))


def test_a_run_folder_of_v1(made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(models.contents(made), tmp_path / "jepa-latest.pth.tar")
    assert open_checkpoint(tmp_path).path == tmp_path / "jepa-latest.pth.tar"
    torch.save(models.contents(made), tmp_path / "other-latest.pth.tar")
    with pytest.raises(UserError, match=r"jepa-latest\.pth\.tar, other-latest\.pth\.tar"):
        open_checkpoint(tmp_path)


def test_a_config_of_a_later_version(made: vf.VJEPA, tmp_path: Path) -> None:
    config = models.config().model_dump(mode="json")
    config["model"]["new_part"] = 3
    torch.save(models.contents(made) | {"vjepa_fast": {"config": config}}, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="new_part.*version"):
        vf.load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(made: vf.VJEPA, tmp_path: Path) -> None:
    torch.save(models.contents(made), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="device.*cuda.*GPU"):
        vf.load(tmp_path / "a.pt", device="cuda")


class _Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder": _Runs()}, "code.pt")
    with pytest.raises(UserError, match=r"code\.pt\b.*mkdir\b"):
        vf.load("code.pt")
    assert not Path("ran").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["latest.pt", "model.safetensors"])
def test_a_truncated_file_is_refused(name: str, share: float, made: vf.VJEPA, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(models.contents(made), path)
    else:
        save_file(made.encoder.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="truncated.*damaged"):
        vf.load(path)


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    for name, contents, said in (
        ("a.pt", {"model": {"x": torch.zeros(1)}}, r"a\.pt\b.* V-JEPA\b.*\bmodel\b"),
        ("b.pt", {"x": torch.zeros(1)}, r"b\.pt\b.* V-JEPA\b"),
        ("c.pt", [1], r"c\.pt\b.* list\b.* dictionary\b"),
    ):
        torch.save(contents, tmp_path / name)
        with pytest.raises(UserError, match=said):
            vf.load(tmp_path / name)
    with pytest.raises(UserError, match=r"no checkpoint.*\blatest\.pt\b"):
        vf.load(tmp_path)
    with pytest.raises(UserError, match=r"gone\.pt\b"):
        vf.load(tmp_path / "gone.pt")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="'vit'.*'vjepa2'"):
        vf.load(tmp_path)
