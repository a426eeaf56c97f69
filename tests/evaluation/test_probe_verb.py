"""`vjepa-fast probe`: results of a small evaluation, and a sentence for everything that can be wrong with labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vjepa_fast.checkpoints.open import open_checkpoint
from vjepa_fast.cli.main import app
from vjepa_fast.evaluation import probes
from vjepa_fast.models.attentive import AttentiveClassifier

QUICK = ("--epochs", "2", "--lr", "1e-3,1e-4", "--weight-decay", "0.1")


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["probe", *map(str, args)])


def of(checkpoint: Path, manifests: tuple[Path, Path], out: Path, *args: Any) -> Any:
    return run("--checkpoint", checkpoint, "--train", manifests[0], "--val", manifests[1], "--out", out, *args)


def test_classes(
    checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    result = of(checkpoint, manifests, out, *QUICK, "--segments", 2, "--views", 3, "--augmented", 2, "--depth", 2)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "curves.png", "probe.pt", "results.json"]
    found = json.loads((out / "results.json").read_text())
    assert found["classes"] == [3, 7] and found["task"] == "classification"
    assert found["train"]["videos"] == 6 and found["val"]["videos"] == 2
    assert found["weights"] == "target_encoder"
    assert set(found["probes"]) == {"baseline", *probes.BUILT_IN}
    assert found["probes"]["baseline"]["scores"]["top1"] == 0.5
    attentive = found["probes"]["attentive"]
    assert [(head["lr"], head["weight_decay"]) for head in attentive["heads"]] == [(1e-3, 0.1), (1e-4, 0.1)]
    assert (out / "confusion.png").stat().st_size > 5000 and (out / "curves.png").stat().st_size > 5000
    # The probes are a file that `convert --probe` takes, and modules of ours and Meta's load.
    states = open_checkpoint(out / "probe.pt").classifiers
    assert len(states) == 2
    AttentiveClassifier(96, 16, 2, 2).load_state_dict(states[0])

    # Once more: nothing is encoded again, and the results are the same to the bit.
    monkeypatch.setattr("vjepa_fast.evaluation.features.encode_views", lambda *args: 1 / 0)
    again = of(
        checkpoint, manifests, tmp_path / "again", *QUICK, "--segments", 2, "--views", 3, "--augmented", 2, "--depth", 2
    )
    assert again.exit_code == 0, again.output
    assert "features of 20 of 20 videos were there already" in again.output
    assert json.loads((tmp_path / "again" / "results.json").read_text())["probes"] == found["probes"]


def test_numbers(checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("".join(f"{videos / f'{n}.mp4'} {n / 2},{-n}\n" for n in range(6)))
    val.write_text("".join(f"{videos / f'{n}.mp4'}::{n / 2} {-n}\n" for n in range(6, 8)))
    out = tmp_path / "out"
    result = of(checkpoint, (train, val), out, *QUICK, "--targets", "x,y", "--style", "vjepa1", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "r2 of x" in " ".join(result.output.split())
    found = json.loads((out / "results.json").read_text())
    assert found["task"] == "regression" and set(found["probes"]["linear"]["scores"]["r2_by_target"]) == {"x", "y"}
    assert (out / "predicted.png").exists()


def test_only_means_are_kept_where_they_suffice(checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path) -> None:
    assert of(checkpoint, manifests, tmp_path / "out", "--probe", "linear,knn").exit_code == 0
    (part,) = (tmp_path / "cache").glob("vjepa_fast/features/*/*.safetensors")
    assert part.stat().st_size < 8 * 96 * 4 + 2000
    assert not (tmp_path / "out" / "curves.png").exists()


def test_the_student_on_demand(checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path) -> None:
    assert of(checkpoint, manifests, tmp_path / "out", "--probe", "knn", "--weights", "encoder").exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["weights"] == "encoder"


@pytest.mark.parametrize(
    ("train", "val", "message", "code"),
    [
        ("0 3\n1 3\n", "2 3\n", "all 2 videos of '{train}' are of class 3; expected at least two classes", 1),
        ("0\n1\n", "2 3\n", 'are of class 0; expected at least two classes (a line is "path label"', 1),
        (
            "0 3\n1 7\n",
            "2 3\n3 9\n",
            "1 of the 2 videos of '{val}' are of class 9, of which '{train}' has no video, so that no probe can know "
            "it; leave them out of '{val}', or add videos to '{train}'",
            1,
        ),
        ("0 3\n1 7\n", "", "dataset '{val}' is empty", 1),
        ("0 3\n1 -7\n", "2 3\n", "class numbers start at 0", 1),
        ("0 3\n1 dog\n", "2 3\n", "the label of {videos}/1.mp4 is 'dog'; expected numbers, separated by commas", 1),
        ("0 0.5\n1 0.25,3\n", "2 0.5\n", "has 2 numbers, the first one 1; expected as many for every video", 1),
        ("0 0.5\n1 0.5\n", "2 0.5\n3 1\n", "target 0 is 0.5 for every video; there is nothing to predict", 1),
        ("0 0.5\n", "2 0.5\n3 1\n", "dataset '{train}' has one video; expected at least two", 1),
        ("0 0.5\n1 nan\n", "2 0.5\n3 1\n", "expected numbers", 1),
        (
            "0 3\n1 7\n0 7\n",
            "2 3\n",
            "dataset '{train}': {videos}/0.mp4 is there twice, with label 3 and with 7; expected one label a video",
            1,
        ),
        ("0 3\n1 7\n", "2 3\n2 3\n2 7\n", "dataset '{val}': {videos}/2.mp4 is there twice, with label 3 and with 7", 1),
        (
            "0 0.5,1\n1 2,3\n0 0.5,2\n",
            "2 0.5,1\n",
            "{videos}/0.mp4 is there twice, with label '0.5,1' and with '0.5,2'",
            1,
        ),
    ],
)
def test_labels_that_do_not_fit(
    checkpoint: Path, videos: Path, tmp_path: Path, train: str, val: str, message: str, code: int
) -> None:
    names = {}
    for name, text in (("train", train), ("val", val)):
        names[name] = tmp_path / f"{name}.csv"
        lines = [line.split(maxsplit=1) for line in text.splitlines()]
        names[name].write_text("".join(" ".join([str(videos / f"{line[0]}.mp4"), *line[1:]]) + "\n" for line in lines))
    result = of(checkpoint, (names["train"], names["val"]), tmp_path / "out")
    assert result.exit_code == code, result.output
    assert message.format(**names, videos=videos) in result.output
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()


def test_a_video_that_is_listed_again_counts_once(
    checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    manifests[0].write_text(2 * manifests[0].read_text())
    assert of(checkpoint, manifests, tmp_path / "out", "--probe", "knn").exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["train"]["videos"] == 6


def test_what_is_odd_is_said(checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = manifests
    val.write_text(val.read_text().splitlines()[0] + "\n" + train.read_text().splitlines()[0] + "\n")
    result = of(checkpoint, manifests, tmp_path / "out", "--probe", "knn")
    assert result.exit_code == 0, result.output
    assert f"1 of the 2 videos of '{val}' are in '{train}' too" in result.output
    assert f"'{val}' has no video of class 7" in result.output


def test_videos_that_cannot_be_read_are_left_out(
    checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    manifests[0].write_text(manifests[0].read_text() + f"{tmp_path / 'broken.mp4'} 3\n")
    result = of(checkpoint, manifests, tmp_path / "out", "--probe", "linear")
    assert result.exit_code == 0, result.output
    assert f"1 video could not be read and is left out ({tmp_path / 'broken.mp4'}: " in result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["train"]["videos"] == 6 and list(found["broken"]) == [str(tmp_path / "broken.mp4")]
    whole = manifests[1].read_text()
    manifests[1].write_text(f"{tmp_path / 'broken.mp4'} 3\n")
    result = of(checkpoint, manifests, tmp_path / "other", "--probe", "linear")
    assert result.exit_code == 1
    assert f"none of the 1 videos of '{manifests[1]}' could be read" in result.output
    good = manifests[0].read_text().split()[0]
    for train, val, message in (
        ("{good} 3\n{broken} 7\n", whole, "that can be read are all of one class"),
        ("{good} 0.5\n{broken} 1.5\n", "{good} 0.5\n{other} 1.5\n", "target 0 is 0.5 for every video that can be read"),
        ("{good} 3\n{other} 4\n{broken} 7\n", "{good} 7\n", "no video of class 7 of"),
    ):
        names = {"good": good, "broken": tmp_path / "broken.mp4", "other": whole.split()[0]}
        for manifest, text in zip(manifests, (train, val), strict=True):
            manifest.write_text(text.format(**names))
        result = of(checkpoint, manifests, tmp_path / "other", "--probe", "linear,knn")
        assert result.exit_code == 1 and message in result.output, result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (
            ("--probe", "nearest"),
            f"--probe is 'nearest'; expected one or several of {', '.join(probes.BUILT_IN)}, separated by commas",
            2,
        ),
        (("--lr", "1e-3,fast"), "--lr is '1e-3,fast'; expected numbers of at least 0, separated by commas", 2),
        (("--fps", "4", "--frame-step", "4"), "--fps and --frame-step are given; expected one of them", 2),
        (("--probe-heads", "7"), "--probe-heads is 7; expected a divisor of the encoder's width, 96", 2),
        (("--targets", "x,y"), "--targets x,y names columns of numbers, but the labels", 2),
        (("--set", "embed_dim=192"), "does not fit the model", 1),
        (("--weights", "teacher"), "has no teacher", 2),
    ],
)
def test_options_that_do_not_fit(
    checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path, args: tuple[str, ...], message: str, code: int
) -> None:
    result = of(checkpoint, manifests, tmp_path / "out", *args)
    assert result.exit_code == code, result.output
    assert message in result.output


def test_nothing_is_written_over(checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("mine")
    result = of(checkpoint, manifests, tmp_path)
    assert result.exit_code == 2 and "exists; give another --out or remove it" in result.output
    result = of(checkpoint, manifests, tmp_path / "results.json")
    assert result.exit_code == 2 and "is a file; expected a folder" in result.output


def test_a_full_disk_is_seen_before_it_is_full(
    checkpoint: Path, manifests: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    result = of(checkpoint, manifests, tmp_path / "out", *QUICK)
    assert result.exit_code == 1, result.output
    assert "name a --cache with more room" in result.output
