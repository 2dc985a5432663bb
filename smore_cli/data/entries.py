"""Local files and hub datasets row by row, for what is not to be read as a whole.

A row that only passes by (while a stream is wound forward, or because another process needs it) should cost as little
as possible, so a line of a .jsonl file stays bytes until it is needed: an `Entry` holds what is cheap to get.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smore_cli.data.bundled import QUICKSTART, quickstart_files
from smore_cli.data.files import CSV_HINT, csv_header, data_kind, read_file
from smore_cli.data.folders import split_files
from smore_cli.data.json_text import json_line
from smore_cli.data.quiet import first_line
from smore_cli.data.sources import describe_source, read_source, source_files
from smore_cli.data.tables import is_saved_dataset
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from smore_cli.recipe.schema import Source

__all__ = ["Entry", "entry_reader"]

RawRow = dict[str, Any]
PARQUET_ROWS = 1000
"""Rows of a parquet file that are decoded at a time."""


class Entry(NamedTuple):
    """A row that has not been looked at.

    Attributes:
        place: where it stands, for messages.
        raw: the line, or the row where the file's kind has no cheaper form.
    """

    place: str
    raw: bytes | RawRow

    def row(self) -> RawRow:
        """Returns the row.

        Raises:
            DataError: the line is not a JSON object.
        """
        if isinstance(self.raw, dict):
            return self.raw
        try:
            return json_line(self.raw.decode("utf-8-sig").rstrip("\r\n"), self.place)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place}: not UTF-8 text", "save the file as UTF-8") from error

    def content(self) -> bytes:
        """Returns bytes that differ where rows differ."""
        return self.raw if isinstance(self.raw, bytes) else json.dumps(self.raw, default=repr).encode()


def entry_reader(source: Source) -> Callable[[], Iterator[Entry]]:
    """Returns a function that reads a source from its beginning.

    Raises:
        DataError: the source is not there, or is of a kind that can only be read as a whole.
    """
    origin, path = describe_source(source), Path(source.path).expanduser()
    if "[" in source.split:
        raise DataError(f"{origin}: a stream has no slices", "name a whole split, or set data.streaming: false")
    if source_files(source) is None:
        return partial(_hub_entries, source, origin)
    if path.is_dir() and is_saved_dataset(path):
        return partial(_mapped_rows, source, origin)
    if source.path == QUICKSTART:
        splits = {split: [file] for split, file in quickstart_files().items()}
    else:
        splits = split_files(source.path)
    if source.split not in splits:
        raise DataError(f"{origin}: there is no such split", f"there is {' and '.join(splits)}")
    return partial(_chained, [_file_reader(file) for file in splits[source.split]])


def _chained(readers: list[Callable[[], Iterator[Entry]]]) -> Iterator[Entry]:
    for read in readers:
        yield from read()


def _file_reader(path: Path) -> Callable[[], Iterator[Entry]]:
    if not path.exists():
        read_file(path, str(path))  # says what is close to it
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows, ".arrow": _arrow_rows}
    reader = readers.get(data_kind(path))
    if reader is None:
        problem = f"{path}: a file that ends in '{path.suffix}' can only be read as a whole"
        raise DataError(problem, "stream .jsonl, .csv or .parquet, or set data.streaming: false")
    return partial(reader, path, str(path))


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _json_lines(path: Path, origin: str) -> Iterator[Entry]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Entry(f"{origin}:{number}", line)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(origin, error) from error


def _csv_rows(path: Path, origin: str) -> Iterator[Entry]:
    try:
        with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            lines = csv.reader(text, strict=True)
            header = csv_header(lines, origin)
            for cells in lines:
                if any("\0" in cell for cell in cells):
                    problem = f"{origin}:{lines.line_num}: a NUL byte"
                    raise DataError(problem, "the file is damaged, or not UTF-8: save it again as UTF-8")
                if cells and len(cells) != len(header):
                    count = f"{len(cells)} cells where the header has {len(header)}"
                    raise DataError(f"{origin}:{lines.line_num}: {count}", "quote cells that hold a comma")
                if cells:
                    yield Entry(f"{origin}:{lines.line_num}", dict(zip(header, cells, strict=True)))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 text, after line {lines.line_num}", "save the file as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{origin}:{lines.line_num}: not valid CSV: {error}", CSV_HINT) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(origin, error) from error


def _parquet_rows(path: Path, origin: str) -> Iterator[Entry]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Entry(f"{origin}, row {number}", row)
    except pyarrow.ArrowException as error:
        problem = f"{origin}: not a parquet file, after row {number}: {first_line(error)}"
        raise DataError(problem, "download or write it again") from error
    except OSError as error:
        raise _unreadable(origin, error) from error


def _arrow_rows(path: Path, origin: str) -> Iterator[Entry]:
    return _numbered(read_file(path, origin), origin)  # mapped into memory, however large it is


def _mapped_rows(source: Source, origin: str) -> Iterator[Entry]:
    return _numbered(read_source(source).raw, origin)


def _numbered(rows: Iterable[Any], origin: str) -> Iterator[Entry]:
    for number, row in enumerate(rows, 1):
        yield Entry(f"{origin}, row {number}", dict(row))


def _hub_entries(source: Source, origin: str) -> Iterator[Entry]:
    from smore_cli.data.hub import load_hub_dataset

    rows, number = iter(load_hub_dataset(source, streaming=True)), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of the network, of the file system on top of it, or of a file's format
            problem = f"hub dataset {origin}: broke off after row {number}: {first_line(error)}"
            raise DataError(problem, "go on with --resume when it can be read") from error
        if row is None:
            return
        number += 1
        yield Entry(f"{origin}, row {number}", dict(row))


def _unreadable(origin: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return DataError(f"{origin}: cannot be read: {reason}", "mend it, then go on with --resume")
