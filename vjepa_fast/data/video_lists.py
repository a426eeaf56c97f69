"""Lists of video and image files: CSV, .npy, a folder or a glob.

CSV, one clip a line, no header, label optional (0 where there is none, as for the other kinds):

    videos/a.mp4 3                   path, space, label
    videos/a.mp4::a dog runs         `::` for labels that hold spaces (captions)
    "videos/a long name.mp4" 3       quoted path; a quote inside is doubled
    videos/a long name.mp4 3         the last field is the label, unless it ends like a media file or the whole
                                     line is the path of a file

A label that reads as an integer is an int, else a str. Relative paths are taken from the working directory or from the
CSV's own folder, whichever holds the first entries that exist: one decision a manifest, so that a list of a million
files is not looked up one by one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vjepa_fast.common.errors import UserError

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"}
)
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
_NUM_PROBED = 32
_EXPECTED = 'expected lines of the form "path label" or "path::label"'


def is_image(path: str) -> bool:
    """Whether a path is read as a still clip."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


def read_list(name: str) -> tuple[Sequence[str], list[Any]]:
    """Paths and labels of one list.

    Raises:
        UserError: missing, empty or unreadable.
    """
    extension = os.path.splitext(name)[1].lower()
    if os.path.isdir(name):
        paths = _walk(name)
        expected = f"no file in it ends in one of {', '.join(sorted(MEDIA_EXTENSIONS))}"
    elif not os.path.exists(name) and glob.has_magic(name):
        paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        expected = "the glob matches no file"
    elif not os.path.exists(name):
        raise UserError(f"dataset {name!r} does not exist; expected a CSV, a .npy file, a folder, a glob or a pack")
    elif extension == ".npy":
        paths, expected = _read_npy(name), "the array is empty"
    elif extension in MEDIA_EXTENSIONS:
        paths, expected = [name], ""
    else:
        return _read_csv(name)
    if not paths:
        raise UserError(f"dataset {name!r} holds no videos: {expected}")
    return paths, [0] * len(paths)


def _walk(folder: str) -> list[str]:
    found = []
    for parent, _, files in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, f) for f in files if os.path.splitext(f)[1].lower() in MEDIA_EXTENSIONS]
    return sorted(found)


def _read_npy(name: str) -> list[str]:
    try:
        array = np.load(name, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"dataset {name!r} cannot be read as an array of strings ({error}); pickled arrays are refused because "
            "loading one can run code. Write it with np.save(file, np.array(paths, dtype=str))"
        ) from error
    if array.ndim != 1 or array.dtype.kind not in "US":
        raise UserError(
            f"dataset {name!r} holds an array of shape {array.shape} and dtype {array.dtype}; expected one dimension "
            "of strings, as written by np.save(file, np.array(paths, dtype=str))"
        )
    return [os.fsdecode(path) for path in array.tolist()]


def _read_csv(name: str) -> tuple[list[str], list[Any]]:
    try:
        with open(name, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line for line in map(str.strip, file) if line]
    except OSError as error:
        raise UserError(f"dataset {name!r} cannot be read: {error.strerror}; {_EXPECTED}") from error
    if not lines:
        raise UserError(f"dataset {name!r} is empty; {_EXPECTED}")
    if any("\0" in line for line in lines[:_NUM_PROBED]):
        raise UserError(f"dataset {name!r} is not a text file; {_EXPECTED}")
    folder = os.path.dirname(os.path.abspath(name))
    paths, labels = [], []
    for line in lines:
        path, label = _split_line(line, folder)
        paths.append(path)
        labels.append(_parse_label(label))
    first = paths[0]
    if "," in first and os.path.splitext(first.split(",")[0])[1].lower() in MEDIA_EXTENSIONS:
        raise UserError(f"dataset {name!r} looks separated by commas (first line {lines[0][:80]!r}); {_EXPECTED}")
    probed = [path for path in paths[:_NUM_PROBED] if not os.path.isabs(path)]
    base = os.getcwd()
    if not any(map(os.path.exists, probed)) and any(os.path.exists(os.path.join(folder, path)) for path in probed):
        base = folder
    return [os.path.join(base, path) for path in paths], labels


def _split_line(line: str, folder: str) -> tuple[str, str | None]:
    if line[0] == '"':
        end = line.find('"', 1)
        while end != -1 and line[end + 1 : end + 2] == '"':
            end = line.find('"', end + 2)
        if end != -1:
            rest = line[end + 1 :].strip()
            return line[1:end].replace('""', '"'), rest.removeprefix("::").strip() or None
    if "::" in line:
        path, _, label = line.partition("::")
        return path.strip(), label.strip()
    path, _, label = line.rpartition(" ")
    path = path.rstrip()
    if not path:
        return label, None
    if label.isdecimal():
        return path, label
    if os.path.splitext(label)[1].lower() in MEDIA_EXTENSIONS:
        return line, None
    # Only an odd line costs a look-up on the disk.
    if os.path.isfile(line) or os.path.isfile(os.path.join(folder, line)):
        return line, None
    return path, label


def _parse_label(label: str | None) -> int | str:
    if label is None:
        return 0
    try:
        return int(label)
    except ValueError:
        return label
