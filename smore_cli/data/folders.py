"""Several files as one source: a folder, or a pattern such as `data/*.jsonl`, in the order of their names.

In a folder whose files are named after splits (train.jsonl, test-00000.parquet) each split is its own; else, and for a
pattern, all files together are `train`. Row numbers count within each file, so that a message leads to the line.
"""

from __future__ import annotations

import glob
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from smore_cli.data.files import KINDS, READERS, data_kind, read_file
from smore_cli.data.tables import is_saved_dataset, read_saved_dataset
from smore_cli.errors import DataError

__all__ = ["JoinedRows", "is_pattern", "read_local", "split_files"]

_SPLIT = re.compile(r"(train|validation|valid|dev|eval|test)(?![a-z])", re.IGNORECASE)


class JoinedRows(Sequence[dict[str, Any]]):
    """The rows of several files, one after another.

    Args:
        parts: what messages call each file, and its rows.
    """

    def __init__(self, parts: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(rows) for _, rows in self.parts))

    def __len__(self) -> int:
        """Returns how many rows there are in all files."""
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Returns a row, counted over all files from 0."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        part, place = self._find(range(len(self))[index])
        return dict(self.parts[part][1][place])

    def __iter__(self) -> Any:
        """Yields every row, file after file."""
        for _, rows in self.parts:
            yield from rows

    def place(self, index: int) -> str:
        """Returns file and row number (from 1) of a row, counted over all files from 0."""
        part, place = self._find(index)
        return f"{self.parts[part][0]}, row {place + 1}"

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def is_pattern(path: str) -> bool:
    """Whether a source's path stands for several files: it has a star, a question mark or brackets, and is no file."""
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def read_local(path: str) -> dict[str, Sequence[dict[str, Any]]]:
    """Returns the rows of a local source by split: of a file, a folder, or all files that fit a pattern.

    Raises:
        DataError: nothing is there, or something cannot be read.
    """
    place = Path(path).expanduser()
    if place.is_dir() and is_saved_dataset(place):
        return read_saved_dataset(place, path)
    found: dict[str, Sequence[dict[str, Any]]] = {}
    for split, files in split_files(path).items():
        if files == [place]:
            found[split] = read_file(place, path)
        else:
            parts = [(_named(file, path), read_file(file, _named(file, path))) for file in files]
            found[split] = JoinedRows(parts)
    return found


def split_files(path: str) -> dict[str, list[Path]]:
    """Returns the files of a local source by split; a file that is not there is returned too.

    Raises:
        DataError: a folder without a data file, or with some files named after splits and others not; a pattern that no
            file fits.
    """
    place = Path(path).expanduser()
    if is_pattern(path):
        files = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
        if not files:
            raise DataError(f"no file fits the pattern {path}", "paths are relative to where the command runs")
        return {"train": files}
    if not place.is_dir():
        return {"train": [place]}
    files = [file for file in sorted(place.iterdir()) if data_kind(file) in READERS and file.name[0] not in "._"]
    if not files:
        raise DataError(f"{path} is a folder without a data file", _inside(place))
    names = [_SPLIT.match(file.name) for file in files]
    if not any(names):
        return {"train": files}
    if not all(names):
        odd = next(file.name for file, name in zip(files, names, strict=True) if not name)
        problem = f"{path}: some files are named after splits and '{odd}' is not"
        raise DataError(problem, "name one file, or a pattern such as " + str(place / f"*{files[0].suffix}"))
    splits: dict[str, list[Path]] = {}
    for file, name in zip(files, names, strict=True):
        splits.setdefault(name.group(1).lower() if name else "", []).append(file)
    return splits


def _named(file: Path, path: str) -> str:
    """Returns a file's name for messages, as it could stand in a recipe."""
    place = Path(path).expanduser()
    return f"{path.rstrip('/')}/{file.name}" if place.is_dir() else str(file)


def _inside(folder: Path) -> str:
    """Returns what to do about a folder that holds no data file itself."""
    for below in sorted(child for child in folder.iterdir() if child.is_dir()):
        if is_saved_dataset(below) or any(data_kind(file) in READERS for file in below.iterdir()):
            return f"name the folder in it: {below}"
    return f"a data file ends in {KINDS}"
