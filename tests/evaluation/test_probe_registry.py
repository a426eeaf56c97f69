"""The registry of probes: what is in it, what comes from outside, and what `--probe` says of a name that is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.evaluation import probes
from vjepa_fast.evaluation.attentive_probe import HeadSetting
from vjepa_fast.evaluation.labels import Labels, Split
from vjepa_fast.evaluation.metrics import scores_of
from vjepa_fast.inference.videos import Videos

DOCS = Path(__file__).parents[2] / "docs" / "probes.md"
OUTSIDE = '''
import torch

from vjepa_fast.evaluation.metrics import scores_of
from vjepa_fast.evaluation.probes import ProbeResult


class Last:
    """Says the last class, always."""

    reads = "means"

    def fit(self, features, settings, device, report):
        report(0, 1, "")
        report(1, 1, "done")
        labels = features.labels
        outputs = torch.eye(labels.num_outputs)[-1].expand(len(features.val_means()), -1)

        def write_files(folder):
            (folder / "last.txt").write_text("nothing was learned")

        return ProbeResult("the last class", scores_of(labels, outputs), outputs, {"note": "mine"}, write_files)
'''


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing that a test registers stays."""
    monkeypatch.setattr(probes, "_registered", {})
    probes._installed.cache_clear()
    yield
    probes._installed.cache_clear()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a module of a probe, as another package's."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "probe_from_outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("probe_from_outside", None)


def measure(checkpoint: Path, manifests: tuple[Path, Path], out: Path, names: str) -> Any:
    args = ["probe", "--checkpoint", checkpoint, "--train", manifests[0], "--val", manifests[1], "--out", out]
    return CliRunner().invoke(app, [*map(str, args), "--probe", names])


@pytest.mark.parametrize("name", probes.BUILT_IN)
def test_every_probe_has_what_the_protocol_asks_and_a_row_in_the_docs(name: str) -> None:
    probe = probes.create(name)
    assert probe.reads in ("means", "tokens") and callable(probe.fit)
    assert f"\n| `{name}` |" in DOCS.read_text()


@pytest.mark.parametrize("name", probes.BUILT_IN)
def test_every_probe_says_more_than_the_labels_alone(name: str) -> None:
    """On features that hold the class, of 24 videos, 12 of them fitted; guessing is right in a third."""
    labels = torch.arange(24) % 3
    tokens = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(24), :, labels] += 5
    features = FakeFeatures(tokens, labels)
    settings = probes.ProbeSettings([HeadSetting(1e-2, 0.01)], depth=1, num_heads=2, epochs=20, batch_size=4)
    told: list[tuple[int, int]] = []
    probe = probes.create(name)
    result = probe.fit(features, settings, torch.device("cpu"), lambda done, total, text: told.append((done, total)))  # type: ignore[arg-type]
    assert result.outputs.shape == (12, 3) and result.title
    assert result.scores == scores_of(features.labels, result.outputs) and result.scores["top1"] >= 0.75
    json.dumps(result.details)
    assert not told or told == [(done, told[0][1]) for done in range(told[0][1] + 1)]


class FakeFeatures:
    """The first half of some features as the training set, the second as the validation set."""

    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        self._train, self._val = tokens.chunk(2)
        train, val = (Split(name, Videos(), own) for name, own in zip("tv", labels.chunk(2), strict=True))
        self.labels = Labels("classification", train, val, [0, 1, 2], [], [])

    def train_tokens(self, epoch: int, numbers: Any) -> torch.Tensor:
        return self._train[list(numbers)]

    def val_tokens(self, numbers: Any) -> torch.Tensor:
        return self._val[list(numbers)][:, None]

    def train_means(self) -> torch.Tensor:
        return self._train.mean(1)

    def val_means(self) -> torch.Tensor:
        return self._val.mean(1)[:, None]


@pytest.mark.parametrize("how", ["module:Class", "class", "entry point"])
def test_a_probe_of_another_package(
    how: str, outside: Path, checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    if how == "entry point":
        installed = outside / "other-1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        (installed / "entry_points.txt").write_text(f"[{probes.ENTRY_POINTS}]\nlast = probe_from_outside:Last\n")
    elif how == "class":
        import probe_from_outside  # type: ignore[import-not-found]

        probes.register("last", "the last class", probe_from_outside.Last)
    else:
        probes.register("last", "the last class", "probe_from_outside:Last")
    assert probes.names() == [*probes.BUILT_IN, "last"]
    result = measure(checkpoint, manifests, tmp_path / "out", "last,knn")
    assert result.exit_code == 0, result.output
    assert "the last class" in result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["probes"]) == ["baseline", "knn", "last"]
    assert found["probes"]["last"] == {"scores": {"top1": 0.5, "mean_class_accuracy": 0.5}, "note": "mine"}
    assert (tmp_path / "out" / "last.txt").exists()


def test_a_name_that_is_taken_or_cannot_be_written() -> None:
    for name in ("linear", "baseline"):
        with pytest.raises(ValueError, match=f"there is a probe '{name}' already"):
            probes.register(name, "", "nowhere:Probe")
    for name in ("", "a,b", "a b"):
        with pytest.raises(ValueError, match="without commas and spaces"):
            probes.register(name, "", "nowhere:Probe")
    assert probes.names() == list(probes.BUILT_IN)


def test_an_entry_point_does_not_take_over_a_name(outside: Path) -> None:
    installed = outside / "other-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{probes.ENTRY_POINTS}]\nlinear = probe_from_outside:Last\n")
    assert type(probes.create("linear")).__name__ == "LinearProbe"


@pytest.mark.parametrize(
    ("given", "hint"), [("liner", "did you mean linear?"), ("knn,atentive", "did you mean attentive?")]
)
def test_the_nearest_name_is_told(given: str, hint: str, checkpoint: Path, tmp_path: Path) -> None:
    result = measure(checkpoint, (tmp_path / "a.csv", tmp_path / "b.csv"), tmp_path / "out", given)
    assert result.exit_code == ConfigError.exit_code
    assert hint in result.output and ", ".join(probes.BUILT_IN) in result.output
