"""The page about a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import vjepa_fast as vf
from tests.helpers.trainer_fixtures import poison
from vjepa_fast.common.errors import UserError
from vjepa_fast.config import dump
from vjepa_fast.train.monitor.metrics import COLUMNS, MetricsLog
from vjepa_fast.train.report import run_json, sections
from vjepa_fast.train.report.curves import Curves
from vjepa_fast.train.report.run_report import write_report
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]


class Page(HTMLParser):
    """Its text, the sources of its images, and whether its tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        names = dict(attrs)
        assert not {"href", "onload", "onerror"} & set(names)
        if tag == "img":
            self.sources.append(names["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of four steps with everything that a run can leave, and nothing of torch."""
    folder = tmp_path / "run <1>"
    folder.mkdir()
    cfg = vf.load_recipe("demo", ["optimization.lr=1e-3", "train.max_steps=4"])
    (folder / "config.yaml").write_text(dump(cfg))
    log = MetricsLog(folder, 0, 0)
    for step in range(4):
        log.write(
            [dict.fromkeys(COLUMNS, 1.0) | {"step": step, "loss": 1 - step / 8}],
            {"explained": 0.25, "target_rank": 17.0, "target_std": 0.5},
        )
    (folder / "latest.pt").touch()
    return folder


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Pictures are empty, which saves a second for each page; holds the steps that would be marked in them."""
    found: list[list[int]] = []

    def draw(curves: Curves, marks: Sequence[int]) -> bytes:
        found.append(list(marks))
        return b"picture"

    for name in ("draw_learning", "draw_training"):
        monkeypatch.setattr(sections, name, draw)
    return found


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def test_a_page_of_its_own(run: Path) -> None:
    page = page_of(run)
    assert len(page.sources) == 2 and all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert not {"script", "link", "iframe"} & page.tags
    assert "http" not in (run / "report.html").read_text()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "Run run <1>",
        "The log ends at step 4 of 320",
        "1.000 to 0.625",
        "25 %",
        "17",
        "vit_tiny",
        "float32, 239",
        "8 frames, 48 x 48 pixels, 6 frames/s",
        "there is no run.json",
        "optimization.lr 0.002 0.001",
        "None.",
    ):
        assert words in page.text, words


@pytest.mark.usefixtures("marked")
def test_commands_name_the_real_paths(run: Path) -> None:
    page = page_of(run)
    there = f"'{run}'"
    assert f"vjepa-fast train --config '{run}/config.yaml' --out {there} --resume train.max_steps=null" in page.text
    assert f"vjepa-fast embed videos.csv --checkpoint {there} --out" in page.text
    assert f"vjepa-fast probe --checkpoint {there} --train train.csv --val val.csv" in page.text
    (run / "latest.pt").unlink()
    page = page_of(run)
    assert "There is no checkpoint yet" in page.text and "vjepa-fast embed" not in page.text


@pytest.mark.usefixtures("marked")
def test_what_is_on_record(run: Path) -> None:
    about = {
        "encoder_parameters": 1_500_000,
        "predictor_parameters": 300_000,
        "videos": 12,
        "processes": 2,
        "manifests": ["/data/a b.csv"],
        "held_out": "/data/val.csv",
        "clips_a_step": 16,
        "images_a_step": 0,
    }
    run_json.begin(run, 0, "cpu", about)
    page = page_of(run)
    assert "No end is on record" in page.text and "predictor 0.3 M parameters" in page.text
    run_json.end(run, 2, "interrupted")
    run_json.begin(run, 2, "cpu", about)
    run_json.end(run, 4, "finished")
    page = page_of(run)
    assert "Ended at step 4 of 320 (train.max_steps=4): finished." in page.text
    assert re.search(r"UTC 0 \S+ \S+ UTC 2 interrupted .* UTC 2 \S+ \S+ UTC 4 finished", page.text)
    assert "12 videos: /data/a b.csv" in page.text and "2 x " in page.text and "torch 2." in page.text
    assert "--resume --nproc 2 train.max_steps=null" in page.text
    assert "vjepa-fast embed '/data/a b.csv'" in page.text and "--val /data/val.csv" in page.text
    run_json.end(run, 4, "no <i>luck</i>")
    assert "of 320 (train.max_steps=4): no <i>luck</i>." in page_of(run).text
    # A run from the beginning is another run.
    run_json.begin(run, 0, "cpu", about)
    assert len(run_json.read(run)) == 1


def test_warnings_and_lists_in_their_own_words(run: Path, marked: list[list[int]]) -> None:
    warnings = [
        {"step": 2, "kind": "lost directions", "warning": "<b>the targets</b> collapse & fade"},
        {"step": 3, "kind": "constant answer", "warning": "an easy answer"},
    ]
    (run / "warnings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in warnings) + '{"step": 4, "wa')
    page = page_of(run)
    assert "1 step 2: <b>the targets</b> collapse & fade 2 step 3: an easy answer" in page.text.replace("  ", " ")
    assert marked == [[2, 3], [2, 3]]
    (run / "broken_r1.tsv").write_bytes(b"dataset\tpath\treason\nv.csv\t/v/\xff<img src=x>.mp4\tno moov atom\n")
    (run / "bad_steps_r0.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "probe.json").write_text('{"trained <i>encoder": {"velocity_r2": 0.5}, "raw": {"shape_accuracy": 1}}')
    page = page_of(run)
    assert len(page.sources) == 2
    assert "1; others took their places." in page.text and "<img src=x>.mp4 no moov atom" in page.text
    assert "2, between step 2 and 3" in page.text
    assert "velocity R2 shape accuracy trained <i>encoder 0.50" in page.text.replace("  ", " ")


@pytest.mark.usefixtures("marked")
def test_a_folder_whose_name_is_no_text(run: Path) -> None:
    there = run.rename(run.with_name(os.fsdecode(b"run\xff")))
    assert "Run run?" in page_of(there).text


@pytest.mark.usefixtures("marked")
def test_texts_of_a_config_are_texts(run: Path) -> None:
    config = (run / "config.yaml").read_text().replace("name: demo", "name: '</pre><script>alert(1)</script>'")
    (run / "config.yaml").write_text(config)
    page = page_of(run)
    assert "script" not in page.tags and "</pre><script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no metrics.jsonl"),
        ("", "metrics.jsonl is empty"),
        ('{"step": 0, "lo', "has no line that can be read"),
    ],
)
def test_a_run_without_a_step(content: str | None, sentence: str, run: Path) -> None:
    for name in ("metrics.jsonl", "log_r0.csv"):
        (run / name).unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    page = page_of(run)
    assert sentence in page.text and page.sources == [] and not (run / "loss.png").exists()


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize("content", ["[1]", "}{", '{"a": 1}', '{"a": {"b": "c"}}', '[{"from_step": "x"}]'])
def test_files_that_are_something_else(content: str, run: Path) -> None:
    for name in ("run.json", "probe.json", "warnings.jsonl", "bad_steps_r0.jsonl", "config.yaml"):
        (run / name).write_text(content)
    page = page_of(run)
    assert "probe.json cannot be read" in page.text


@pytest.mark.usefixtures("marked")
def test_a_line_that_a_kill_cut_short(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert "1 line of metrics.jsonl cannot be read and is left out" in page_of(run).text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml.*metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_the_command_line(run: Path) -> None:
    command = [sys.executable, "-m", "vjepa_fast.train.report"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / 'report.html'}\n", "")
    done = subprocess.run([*command, str(run / "nowhere")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_training_writes_it(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("train.max_steps=3").fit()
    make("train.max_steps=6", resume=True).fit()
    folder = tmp_path / "run"
    assert f"report {folder / 'report.html'}, curve {folder / 'loss.png'}" in capsys.readouterr().out
    page = Page(folder / "report.html")
    assert "Ended at step 6 of 40 (train.max_steps=6): finished." in page.text and len(page.sources) == 2
    assert [(start["from_step"], start["to_step"]) for start in run_json.read(folder)] == [(0, 3), (3, 6)]


@pytest.mark.usefixtures("marked")
def test_a_run_that_fails_says_why(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa_fast.train.monitor.recovery.MAX_SKIPPED", 3)
    trainer = make("train.rollback_after=100")
    poison(trainer, range(100))
    with pytest.raises(UserError, match="not finite"):
        trainer.fit()
    assert "the gradients were not finite in" in Page(tmp_path / "run" / "report.html").text


def test_a_report_that_cannot_be_written_fails_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr(sections, "draw_learning", fail)
    assert make("train.max_steps=2").fit().exit_code == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no report" in line]
    assert line == "WARNING: no report of the run: no font"
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.usefixtures("marked")
def test_a_run_on_pixels(make: Make, tmp_path: Path) -> None:
    make("train.max_steps=2", "model.objective=pixels").fit()
    page = Page(tmp_path / "run" / "report.html")
    assert "This run predicts pixels." in page.text and "predicts pixels of the masked tubelets" in page.text
