"""Reading local data files into plain rows, each failure as one line that names the file and the line in it.

JSON and CSV are parsed here and not by `datasets`, which guesses types from a column's values: in a file whose answers
are all dates, "2024-01-05" came back as a datetime, and text such as "007" or "NA" in a CSV as a number or nothing.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.data.json_text import read_json, read_json_lines
from smore_cli.data.quiet import first_line
from smore_cli.data.tables import read_arrow, read_parquet
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["CSV_HINT", "KINDS", "READERS", "csv_header", "data_kind", "read_file"]

CSV_HINT = "a quote is opened and not closed, or stands inside a cell: double it"
RawRow = dict[str, Any]


def data_kind(path: Path) -> str:
    """Returns the suffix that says how a file is read: that before `.gz` for compressed text."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"] and suffixes[0] in TEXTS:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def read_file(path: Path, origin: str) -> Sequence[RawRow]:
    """Returns the rows of a local file, with their types as the file has them (a CSV has only text).

    Args:
        path: a file of one of `KINDS`.
        origin: how messages name the file.

    Raises:
        DataError: no such file, another kind of file, an empty file, or a line that cannot be read.
    """
    if not path.exists():
        if path.is_symlink():
            raise DataError(f"{origin} is a link that leads to no file", "mend the link, or name the file itself")
        raise DataError(f"there is no file {origin}", _near(path))
    kind = data_kind(path)
    if kind not in READERS:
        raise DataError(f"{origin}: cannot read a file that ends in '{path.suffix}'", f"a data file ends in {KINDS}")
    try:
        rows = TEXTS[kind](_read_text(path, origin), origin) if kind in TEXTS else READERS[kind](path, origin)
    except OSError as error:
        raise DataError(f"{origin}: cannot be read: {error.strerror or first_line(error)}") from error
    if len(rows) == 0:
        raise DataError(f"{origin} is empty: it holds no row", "fill it, or take it out of the recipe")
    return rows


def _near(path: Path) -> str:
    """Returns a hint for a file that is not there: close names in its folder, or what the folder holds."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(child.name for child in path.parent.iterdir() if data_kind(child) in READERS)
    if close := difflib.get_close_matches(path.name, names, n=3):
        return f"did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    held = ", ".join(names[:8]) or "no data file"
    return f"{path.parent.resolve()} holds {held}; paths are relative to where the command runs"


def _read_text(path: Path, origin: str) -> str:
    """Returns a file's text, line breaks as in Python; a byte order mark at its start is dropped."""
    data = _read_bytes(path, origin)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{origin}:1: UTF-16 text", "save the file as UTF-8")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{origin}:{line}: a NUL byte", "the file is damaged, or not UTF-8: save it again as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{origin}:{line}: not UTF-8 text", "save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _read_bytes(path: Path, origin: str) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() != ".gz" or not data:
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"{origin}: not a whole gzip file: {first_line(error)}"
        raise DataError(problem, "download or compress it again") from error


def _read_csv(text: str, origin: str) -> list[RawRow]:
    """Reads comma-separated text with a header; every cell stays the text it is."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[RawRow] = []
    try:
        header = csv_header(lines, origin)
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                count = f"{len(cells)} cells where the header has {len(header)}"
                raise DataError(f"{origin}:{lines.line_num}: {count}", "quote cells that hold a comma")
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{origin}:{lines.line_num}: not valid CSV: {error}", CSV_HINT) from error
    return rows


def csv_header(lines: Iterator[list[str]], origin: str) -> list[str]:
    """Returns the names of a table's columns, its first line; none where it has no line.

    Raises:
        DataError: a name stands there twice, or the columns are not separated by commas.
    """
    csv.field_size_limit(sys.maxsize)  # Python's own limit is 131,072 characters a cell; long documents have more
    header = next(lines, [])
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{origin}:1: the header names a column twice: {', '.join(repeated)}", "rename one")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        problem = f"{origin}:1: columns are separated by {other!r}, not by commas"
        raise DataError(problem, "save it with commas, or as .jsonl")
    return header


TEXTS: dict[str, Callable[[str, str], list[RawRow]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": _read_csv,
}
"""How each kind of text is read, which may also be compressed: its name then ends in `.gz` as well."""

READERS: dict[str, Callable[[Any, str], Sequence[RawRow]]] = {**TEXTS, ".parquet": read_parquet, ".arrow": read_arrow}
"""How each kind of file is read, by its suffix: texts from their text, tables from their path."""

KINDS = f"{', '.join(READERS)} (and {', '.join(f'{kind}.gz' for kind in TEXTS)})"
"""The kinds of files, for messages."""
