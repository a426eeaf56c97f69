"""Reads and checks the labels of a training and a validation manifest.

A label is a class number (`video.mp4 3`) or numbers to predict: one (`video.mp4 0.25`) or several, separated by commas
(`video.mp4 0.25,-1.5`) or, after `::`, by spaces too (`video.mp4::0.25 -1.5`). Labels that are all whole numbers
without commas are classes; `--task regression` makes them targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.inference.videos import Videos, list_videos

Task = Literal["classification", "regression"]


@dataclass
class Split:
    """The videos of one manifest with their labels.

    Attributes:
        name: the manifest.
        videos: each once.
        labels: int64 [N] indices into `Labels.classes`, or float64 [N, C] targets.
    """

    name: str
    videos: Videos
    labels: Tensor

    def without(self, gone: set[str]) -> Split:
        """The split without some paths, as a list of what is left; the videos stay where they are."""
        kept = [number for number, path in enumerate(self.videos.paths) if path not in gone]
        if not kept:
            raise UserError(f"none of the {len(self.videos.paths)} videos of {self.name!r} could be read")
        return Split(self.name, self.videos.only(kept), self.labels[torch.tensor(kept)])


@dataclass
class Labels:
    """Both splits.

    Attributes:
        task: what is asked.
        train, val: the splits.
        classes: class numbers as the manifests write them, ascending; empty for regression.
        targets: names of the columns of a regression.
        notes: a sentence for everything that is odd but no error.
    """

    task: Task
    train: Split
    val: Split
    classes: list[int]
    targets: list[str]
    notes: list[str]

    @property
    def num_outputs(self) -> int:
        """Classes or targets."""
        return len(self.classes) if self.task == "classification" else len(self.targets)

    def as_numbers(self, own: Tensor) -> Tensor:
        """float64 [N, C]: labels of a split as what a regression predicts, one-hot for classes."""
        return F.one_hot(own, len(self.classes)).double() if self.task == "classification" else own

    def constant(self, split: Split) -> str:
        """`name is number` of the first target of a regression that is the same for every video; or empty."""
        for name, column in zip(self.targets, split.labels.unbind(1), strict=True):
            if column.min() == column.max():
                return f"{name} is {column[0].item():g}"
        return ""

    def without(self, gone: set[str]) -> Labels:
        """Both splits without some paths, which cannot be read.

        Raises:
            UserError: what is left of a split is nothing, or nothing that tells anything.
        """
        left = replace(self, train=self.train.without(gone), val=self.val.without(gone))
        train = left.train.name
        if self.task == "classification":
            if len(left.train.labels.unique()) < 2:
                raise UserError(f"the videos of {train!r} that can be read are all of one class")
            if unknown := sorted(set(left.val.labels.tolist()) - set(left.train.labels.tolist())):
                raise UserError(
                    f"no video of class {self.classes[unknown[0]]} of {train!r} can be read, so that no "
                    f"probe can know the class; leave it out of {left.val.name!r}"
                )
            return left
        for split in (left.train, left.val):
            if flat := left.constant(split):
                raise UserError(
                    f"dataset {split.name!r}: {flat} for every video that can be read; there is nothing to predict"
                )
        return left


def read_labels(train: str, val: str, task: Task | None = None, names: Sequence[str] = ()) -> Labels:
    """The labels of two manifests.

    Args:
        train, val: CSV files or packs.
        task: None: by the labels.
        names: of the columns of a regression.

    Raises:
        UserError: a manifest is missing or empty, a video has two labels, or labels do not fit each other; the message
            says which.
        ConfigError: `names` do not fit.
    """
    videos = {name: _listed(name) for name in dict.fromkeys((train, val))}
    if task is None:
        whole = all(isinstance(label, int) for one in videos.values() for label in one.labels)
        task = "classification" if whole else "regression"
    notes = []
    both = sorted(set(videos[train].paths) & set(videos[val].paths))
    if both:
        notes.append(
            f"{len(both)} of the {len(videos[val].paths)} videos of {val!r} are in {train!r} too, such as "
            f"{both[0]}: what is measured on them is memory"
        )
    if task == "regression":
        return _regression(train, val, videos, names, notes)
    if names:
        raise ConfigError(
            f"--targets {','.join(names)} names columns of numbers, but the labels of {train!r} are "
            "class numbers; expected labels such as 0.25,-1.5, or --task regression"
        )
    numbers = {
        name: [_class_number(label, name, path) for label, path in zip(one.labels, one.paths, strict=True)]
        for name, one in videos.items()
    }
    classes = sorted(set(numbers[train]))
    if len(classes) == 1:
        raise UserError(
            f"all {len(numbers[train])} videos of {train!r} are of class {classes[0]}; expected at least "
            "two classes" + (' (a line is "path label", and without a label it is 0)' if classes == [0] else "")
        )
    if unknown := sorted(set(numbers[val]) - set(classes)):
        count = sum(number in unknown for number in numbers[val])
        raise UserError(
            f"{count} of the {len(numbers[val])} videos of {val!r} are of {_listing(unknown)}, of which {train!r} has "
            f"no video, so that no probe can know {'it' if len(unknown) == 1 else 'them'}; leave them out of {val!r}, "
            f"or add videos to {train!r}"
        )
    if absent := sorted(set(classes) - set(numbers[val])):
        notes.append(
            f"{val!r} has no video of {_listing(absent)}: nothing is measured on "
            f"{'it' if len(absent) == 1 else 'them'}, and means over classes are over the others"
        )
    place = {number: index for index, number in enumerate(classes)}
    splits = [
        Split(name, videos[name], torch.tensor([place[number] for number in numbers[name]])) for name in (train, val)
    ]
    return Labels("classification", splits[0], splits[1], classes, [], notes)


def _listed(name: str) -> Videos:
    videos = list_videos([name], one_label=True)
    if not videos.paths:
        raise UserError(f'dataset {name!r} is empty; expected lines of the form "path label" or "path::label"')
    return videos


def _listing(classes: Sequence[int]) -> str:
    shown = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
    return f"class {shown}" if len(classes) == 1 else f"{len(classes)} classes ({shown})"


def _class_number(label: Any, name: str, path: str) -> int:
    if not isinstance(label, int):
        raise UserError(
            f"dataset {name!r}: the label of {path} is {label!r}; expected a class number"
            + (", or --task regression" if _numbers(label) else "")
        )
    if label < 0:
        raise UserError(f"dataset {name!r}: the label of {path} is {label}; class numbers start at 0")
    return label


def _numbers(label: Any) -> list[float] | None:
    """The numbers that a label is made of, None where it is something else."""
    try:
        found = [float(text) for text in str(label).replace(",", " ").split()]
    except ValueError:
        return None
    return found if found and all(map(math.isfinite, found)) else None


def _regression(train: str, val: str, videos: dict[str, Videos], names: Sequence[str], notes: list[str]) -> Labels:
    width = None
    columns: dict[str, list[list[float]]] = {}
    for name, one in videos.items():
        columns[name] = []
        for path, label in zip(one.paths, one.labels, strict=True):
            numbers = _numbers(label)
            if numbers is None:
                raise UserError(
                    f"dataset {name!r}: the label of {path} is {label!r}; expected numbers, separated by commas"
                )
            width = width or len(numbers)
            if len(numbers) != width:
                raise UserError(
                    f"dataset {name!r}: the label of {path} has {len(numbers)} "
                    f"{'number' if len(numbers) == 1 else 'numbers'}, the first one {width}; expected as "
                    "many for every video"
                )
            columns[name].append(numbers)
    assert width is not None
    if names and len(names) != width:
        raise ConfigError(f"--targets names {len(names)} columns, but labels have {width}")
    targets = list(names) or [f"target {number}" for number in range(width)]
    if len(columns[train]) < 2:
        raise UserError(f"dataset {train!r} has one video; expected at least two")
    splits = [Split(name, videos[name], torch.tensor(columns[name], dtype=torch.float64)) for name in (train, val)]
    labels = Labels("regression", splits[0], splits[1], [], targets, notes)
    for split in splits:
        if flat := labels.constant(split):
            raise UserError(
                f"dataset {split.name!r}: {flat} for every video; there is nothing to predict. Leave the column out"
            )
    return labels
