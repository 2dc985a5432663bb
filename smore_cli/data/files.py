"""Reading local data files into plain rows, each failure as one line that names the file and the line in it.

JSON and CSV are parsed here and not by `datasets`, which guesses types from a column's values: in a file whose answers
are all dates, "2024-01-05" came back as a datetime, and text such as "007" or "NA" in a CSV as a number or nothing.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.data.quiet import first_line, quiet_datasets
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["READERS", "read_file"]

RawRow = dict[str, Any]


def read_file(path: Path, origin: str) -> Sequence[RawRow]:
    """Returns the rows of a local file, with their types as the file has them (a CSV has only text).

    Args:
        path: a .jsonl, .json, .csv or .parquet file.
        origin: how messages name the file.

    Raises:
        DataError: no such file, a folder, another kind of file, an empty file, or a line that cannot be read.
    """
    if path.is_dir():
        held = sorted(child.name for child in path.iterdir() if child.suffix.lower() in READERS)
        hint = f"name one file in it: {', '.join(held[:8])}" if held else _SUFFIX_HINT
        raise DataError(f"{origin} is a folder", hint)
    if not path.exists():
        raise DataError(f"there is no file {origin}", _near(path))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{origin}: cannot read a file that ends in '{path.suffix}'", _SUFFIX_HINT)
    try:
        rows = reader(path, origin)
    except OSError as error:
        raise DataError(f"{origin}: cannot be read: {error.strerror or first_line(error)}") from error
    if len(rows) == 0:
        raise DataError(f"{origin} is empty: it holds no row")
    return rows


def _near(path: Path) -> str:
    """Returns a hint for a file that is not there: close names in its folder, or what the folder holds."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(child.name for child in path.parent.iterdir() if child.suffix.lower() in READERS)
    if close := difflib.get_close_matches(path.name, names, n=3):
        return f"did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    held = ", ".join(names[:8]) or "no data file"
    return f"{path.parent.resolve()} holds {held}; paths are relative to where the command runs"


def _read_text(path: Path, origin: str) -> str:
    """Returns a file's text; a byte order mark at its start is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{origin}:{line}: not UTF-8 text", "save the file as UTF-8") from error


def _read_jsonl(path: Path, origin: str) -> list[RawRow]:
    return _json_lines(_read_text(path, origin), origin)


def _read_json(path: Path, origin: str) -> list[RawRow]:
    """Reads a list of objects, one object, or (many files called .json are that) one object a line."""
    text = _read_text(path, origin)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines(text, origin)
        raise DataError(f"{origin}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    rows = content if isinstance(content, list) else [content]
    return [_object(row, f"{origin}, row {number}") for number, row in enumerate(rows, 1)]


def _json_lines(text: str, origin: str) -> list[RawRow]:
    rows = []
    # Not splitlines(): it also splits at U+2028 and its kind, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{origin}:{number}:{error.colno}: not valid JSON: {error.msg}"
            raise DataError(problem, "there must be one JSON object a line") from error
        rows.append(_object(row, f"{origin}:{number}"))
    return rows


def _object(row: Any, where: str) -> RawRow:
    if isinstance(row, dict):
        return row
    raise DataError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")


def _read_csv(path: Path, origin: str) -> list[RawRow]:
    """Reads a comma-separated file with a header; every cell stays the text it is."""
    lines = csv.reader(io.StringIO(_read_text(path, origin), newline=""), strict=True)
    rows: list[RawRow] = []
    try:
        header = next(lines, [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{origin}:1: the header names a column twice: {', '.join(repeated)}")
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                count = f"{len(cells)} cells where the header has {len(header)}"
                raise DataError(f"{origin}:{lines.line_num}: {count}", "quote cells that hold a comma")
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{origin}:{lines.line_num}: not valid CSV: {error}") from error
    return rows


def _read_parquet(path: Path, origin: str) -> Sequence[RawRow]:
    if path.stat().st_size == 0:
        return []
    import datasets

    try:
        with quiet_datasets():
            rows: Sequence[RawRow] = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # Arrow's own errors are ValueErrors
        raise DataError(f"{origin}: not a parquet file: {first_line(error.__cause__ or error)}") from error
    return rows


READERS: dict[str, Callable[[Path, str], Sequence[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""How each kind of file is read, by its suffix."""

_SUFFIX_HINT = f"a local source is one file ending in {', '.join(READERS)}"
