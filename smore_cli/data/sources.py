"""From a recipe's `Source` to raw rows: local files, the bundled set, and hub datasets, with the columns renamed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.data.bundled import QUICKSTART, quickstart_files
from smore_cli.data.files import READERS, data_kind, read_file
from smore_cli.data.folders import JoinedRows, read_local, split_files
from smore_cli.data.quiet import first_line
from smore_cli.data.tables import is_saved_dataset
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from smore_cli.recipe.schema import Source

__all__ = ["SourceRows", "describe_source", "read_source", "source_files"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SourceRows:
    """The raw rows of one source.

    Attributes:
        origin: how messages and reports name the source.
        raw: the rows as read.
        columns: renames, {name the format wants: name the row has}.
        roles: names of roles, {name the row has: ours}.
        where: says where a row stands, by its index from 0, in a source of several files.
        notices: filled while the rows are read: what they hold and is not read, and how many times.
    """

    origin: str
    raw: Sequence[Mapping[str, Any]]
    columns: dict[str, str]
    roles: Mapping[str, str] = field(default_factory=dict)
    where: Callable[[int], str] | None = None
    notices: Counter[str] = field(default_factory=Counter)

    def place(self, number: int) -> str:
        """Returns where a row stands, for messages: the source and the row's number in it, from 1."""
        return self.where(number - 1) if self.where else f"{self.origin}, row {number}"

    def __len__(self) -> int:
        """Returns how many rows there are."""
        return len(self.raw)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every row with its columns renamed.

        Raises:
            DataError: a row lacks a column that is to be renamed.
        """
        for number, row in enumerate(self.raw, 1):
            yield self._renamed(row, number)

    def _renamed(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        for wanted, present in self.columns.items():
            if present not in row:
                problem = f"{self.place(number)}: no column '{present}' to use as '{wanted}'"
                raise DataError(problem, f"the row has: {', '.join(map(str, row))}")
        kept = {key: value for key, value in row.items() if key not in self.columns.values()}
        return kept | {wanted: row[present] for wanted, present in self.columns.items()}


def read_source(source: Source) -> SourceRows:
    """Reads a source; a path is a local file if it looks like one, else the name of a hub dataset.

    Raises:
        DataError: the source is missing, empty, unreadable or out of reach; one line and what to do.
    """
    origin = describe_source(source)
    path = Path(source.path).expanduser()
    rows: Sequence[Mapping[str, Any]]
    if source.path == QUICKSTART:
        _refuse_hub_fields(source)
        rows = _select({split: read_file(file, origin) for split, file in quickstart_files().items()}, source, origin)
    elif _is_local(source.path, path):
        _refuse_hub_fields(source)
        splits = read_local(source.path)
        if isinstance(chosen := splits.get(source.split), JoinedRows):
            return SourceRows(origin, chosen, source.columns, source.roles, where=chosen.place)
        rows = _select(splits, source, origin)
    else:
        from smore_cli.data.hub import load_hub_dataset

        rows = load_hub_dataset(source)
    if len(rows) == 0:
        raise DataError(f"{origin} selects no row", "choose a slice that begins within the source")
    return SourceRows(origin, rows, source.columns, source.roles)


def describe_source(source: Source) -> str:
    """Returns a source's name for people: the path, with its configuration and split where they say something."""
    details = [part for part in (source.name, source.split if source.split != "train" else None) if part]
    return f"{source.path} ({', '.join(details)})" if details else source.path


def source_files(source: Source) -> list[Path] | None:
    """Returns the local files that a source is read from, which need not exist; None for a hub dataset."""
    if source.path == QUICKSTART:
        return list(quickstart_files().values())
    path = Path(source.path).expanduser()
    if not _is_local(source.path, path):
        return None
    if path.is_dir() and is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [file for files in split_files(source.path).values() for file in files]


def _is_local(text: str, path: Path) -> bool:
    """Whether a source's path means a file: it exists, ends like a data file, or cannot be a hub name."""
    return path.exists() or data_kind(path) in READERS or not _HUB_NAME.fullmatch(text)


def _refuse_hub_fields(source: Source) -> None:
    for name in ("name", "revision"):
        if getattr(source, name) is not None:
            raise DataError(f"{source.path}: '{name}' is for hub datasets, this source is local", f"remove {name}")


def _select(splits: dict[str, Sequence[Any]], source: Source, origin: str) -> Sequence[Mapping[str, Any]]:
    """Returns the rows that `source.split` names, in the notation of `datasets`: train, train[:100], train[90%:]."""
    if source.split in splits:
        return splits[source.split]
    import datasets

    try:
        wanted = datasets.ReadInstruction.from_spec(source.split)
        ranges = wanted.to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        hint = f"there is {' and '.join(splits)}; slices such as {next(iter(splits))}[:100] work"
        raise DataError(f"{origin}: cannot use split '{source.split}': {first_line(error)}", hint) from error
    return [splits[part.splitname][index] for part in ranges for index in range(part.from_, part.to)]
