"""Every kind of manifest, and messages for those that are none."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.manifest import load_datasets
from vjepa_fast.data.path_list import PathList
from vjepa_fast.data.video_lists import read_list


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_csv_forms(tmp_path: Path) -> None:
    (tmp_path / "odd name").write_text("")
    name = write(
        tmp_path / "list.csv",
        (
            '/v/a.mp4 3\n\n/v/b.mp4\n/v/c.mp4::a dog runs\n"/v/long name.mp4" 7\n"/v/a ""b"".mp4" cat\n'
            "/v/long name.mp4 -2\n/v/long name.mp4\n/v/d.mp4 dog\n" + f"{tmp_path}/odd name\n" + "/v/\u00e9.mp4  4\r\n"
        ),
    )
    paths, labels = read_list(name)
    assert list(zip(paths, labels, strict=True)) == [
        ("/v/a.mp4", 3),
        ("/v/b.mp4", 0),
        ("/v/c.mp4", "a dog runs"),
        ("/v/long name.mp4", 7),
        ('/v/a "b".mp4', "cat"),
        ("/v/long name.mp4", -2),
        ("/v/long name.mp4", 0),
        ("/v/d.mp4", "dog"),
        (f"{tmp_path}/odd name", 0),
        ("/v/\u00e9.mp4", 4),
    ]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    name = write(tmp_path / "there" / "list.csv", "gone.mp4 0\na.mp4 1\n")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "there" / "a.mp4").write_text("")
    assert read_list(name)[0] == [f"{tmp_path}/there/gone.mp4", f"{tmp_path}/there/a.mp4"]
    (tmp_path / "here" / "a.mp4").write_text("")
    assert read_list(name)[0] == [f"{tmp_path}/here/gone.mp4", f"{tmp_path}/here/a.mp4"]


def test_npy_folder_and_glob(tmp_path: Path) -> None:
    for name in ("b/c.MP4", "b/a.webm", "d.jpg", "e.txt", "f.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    np.save(tmp_path / "list.npy", np.array(["/v/a b.mp4", "/v/c.mp4"]))
    assert read_list(str(tmp_path / "list.npy")) == (["/v/a b.mp4", "/v/c.mp4"], [0, 0])
    found = [f"{tmp_path}/b/a.webm", f"{tmp_path}/b/c.MP4", f"{tmp_path}/d.jpg"]
    assert read_list(str(tmp_path)) == (found, [0, 0, 0])
    assert read_list(f"{tmp_path}/**/*.[wj]*")[0] == [found[0], found[2]]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def message(name: str) -> str:
        with pytest.raises(UserError) as error:
            read_list(name)
        assert os.path.basename(name) in str(error.value)
        return str(error.value)

    assert "does not exist" in message(str(tmp_path / "none.csv"))
    assert "matches no file" in message(f"{tmp_path}/*.mp4")
    assert "is empty" in message(write(tmp_path / "empty.csv", "\n \n"))
    assert "commas" in message(write(tmp_path / "comma.csv", "/v/a.mp4,3\n"))
    (tmp_path / "binary.csv").write_bytes(bytes(100))
    assert "not a text file" in message(str(tmp_path / "binary.csv"))
    (tmp_path / "folder").mkdir()
    assert "holds no videos" in message(str(tmp_path / "folder"))
    np.save(tmp_path / "pickled.npy", np.array(["a", "b"], dtype=object), allow_pickle=True)
    assert "pickled arrays are refused" in message(str(tmp_path / "pickled.npy"))
    np.save(tmp_path / "numbers.npy", np.arange(3))
    assert "int64" in message(str(tmp_path / "numbers.npy"))
    np.save(tmp_path / "zero.npy", np.array([], dtype=str))
    assert "holds no videos" in message(str(tmp_path / "zero.npy"))
    (tmp_path / "text.npy").write_text("hello")
    assert "cannot be read" in message(str(tmp_path / "text.npy"))
    with pytest.raises(ConfigError, match="data.datasets is empty"):
        load_datasets(DataConfig())


def test_datasets_carry_their_settings(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{number}.csv", f"/v/{number}.mp4 {number}\n") for number in range(2)]
    datasets = load_datasets(DataConfig(datasets=names, dataset_fpcs=[8, 16], datasets_weights=[1, 3]))
    assert [(d.name, list(d.paths), d.labels, d.fpc, d.weight) for d in datasets] == [
        (names[0], ["/v/0.mp4"], [0], 8, 1.0),
        (names[1], ["/v/1.mp4"], [1], 16, 3.0),
    ]


def test_path_list_behaves_like_a_list() -> None:
    names = ["/a", "", "/\u00e9 b", os.fsdecode(b"/\xff")]
    paths = PathList(names)
    assert list(paths) == names and paths[-1] == names[-1] and paths[1:3] == names[1:3] and len(paths) == 4
    assert list(pickle.loads(pickle.dumps(paths))) == names
    with pytest.raises(IndexError):
        paths[4]


def test_a_large_manifest_is_quick_and_compact(tmp_path: Path) -> None:
    count = 200_000
    name = write(tmp_path / "large.csv", "".join(f"/data/videos/{i:08d}.mp4 {i % 400}\n" for i in range(count)))
    start = time.process_time()
    (dataset,) = load_datasets(DataConfig(datasets=[name]))
    # A million lines in a few seconds; the margin is for a busy machine.
    assert time.process_time() - start < 10
    assert dataset.paths[count - 1] == f"/data/videos/{count - 1:08d}.mp4" and dataset.labels[401] == 1
    assert len(pickle.dumps(dataset.paths)) < 40 * count
