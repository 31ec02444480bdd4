"""What folders of samples have in common: their files, and classes read from the names of sub-folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.samples.source import how_many


@dataclass(frozen=True)
class SampleFolder:
    """The files of a folder that hold samples, and the classes that they belong to.

    Attributes:
        path: The folder.
        files: Relative to it, sorted.
        classes: Names of its sub-folders, sorted; empty unless every file lies in one.
        labels: The label of each class, in the same order.
    """

    path: Path
    files: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        """For descriptions: "photos/"."""
        return f"{self.path.resolve().name}/"

    def label(self, file: Path, items: int = 1) -> NDArray[np.int64] | None:
        """The label of a file's class, once for each item that it holds; None without classes."""
        if not self.classes:
            return None
        return np.full(items, self.labels[self.classes.index(file.parts[0])])

    def origin(self, position: int, file: Path) -> str:
        """Where a sample came from: "sample 3 (photos/cat/1.jpg)"."""
        return f"sample {position} ({self.path.name}/{file.as_posix()})"

    def contents(self, picked: int) -> str:
        """The size of the folder for descriptions: "200 of 5,000 files in 10 classes"."""
        return how_many(picked, len(self.files), "files") + self.of_classes

    @property
    def of_classes(self) -> str:
        """The end of a description; empty without classes."""
        return f" in {len(self.classes)} classes" if self.classes else ""


def open_folder(folder: Path, suffixes: Sequence[str]) -> SampleFolder:
    """The files of a folder and its sub-folders that end in one of the suffixes.

    When every file lies in a sub-folder, the first level of sub-folders are the classes. The label is the position of
    the class among all sorted sub-folder names. When all of these names are integers, or start with one and an
    underscore ("289_n02128757", "7"), that integer is the label: data sets that hold only some of the classes keep
    their true indices.

    Raises:
        InputError: Two classes stand for the same integer.
    """
    files = tuple(file for file in files_below(folder) if file.suffix.lower() in suffixes)
    classes = () if any(len(file.parts) == 1 for file in files) else _class_names(folder)
    return SampleFolder(folder, files, classes, _labels(classes))


def files_below(folder: Path) -> list[Path]:
    """Paths relative to the folder, sorted; links are followed, hidden files are left out."""
    return sorted(
        Path(root, name).relative_to(folder)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    """All sub-folders, also those without samples: leaving one out would shift the labels behind it."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _labels(classes: tuple[str, ...]) -> tuple[int, ...]:
    indices = [re.fullmatch(r"(\d+)(_.*)?", name) for name in classes]
    labels = tuple(int(index[1]) for index in indices if index)
    if len(labels) < len(classes):
        return tuple(range(len(classes)))
    by_label: dict[int, str] = {}
    for name, label in zip(classes, labels, strict=True):
        if by_label.setdefault(label, name) != name:
            what = f"The class folders {by_label[label]!r} and {name!r} both stand for label {label}."
            raise InputError(what, "Rename one of them.")
    return labels
